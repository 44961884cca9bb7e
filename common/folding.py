"""Fold BatchNorm into the layers before it, for networks that are only evaluated."""

import copy
from collections import Counter

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized


def fold_batchnorm(network, example):
    """Multiply BatchNorm into the convolution or linear layer before it: the same in less time.

    In eval mode BatchNorm is a fixed affine map. Which layer feeds it, and it alone, is read from
    autograd's graph of one forward pass, hence whatever the network's own code looks like.

    :param torch.nn.Module network: in eval mode; not changed
    :param torch.Tensor example: one input, (1, C, H, W)
    :return: a folded copy; an unfolded one if folding would change what the network computes
    :rtype: torch.nn.Module
    """
    before, network = network, copy.deepcopy(network)
    calls, outputs, pairs = Counter(), {}, []

    def note_output(layer, _, output):
        calls[layer] += 1
        outputs[output.grad_fn] = layer

    def note_input(norm, inputs):
        calls[norm] += 1
        pairs.append((inputs[0].grad_fn, norm))

    hooks = []
    for module in network.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            hooks.append(module.register_forward_hook(note_output))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            hooks.append(module.register_forward_pre_hook(note_input))
    with torch.enable_grad():
        logits = network(example.requires_grad_())
    for hook in hooks:
        hook.remove()

    readers, stack, seen = Counter(), [logits.grad_fn], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            behind = [n for n, _ in node.next_functions if n is not None]
            readers.update(behind)
            stack += behind

    tails = {}
    for node, norm in pairs:
        layer, tail = outputs.get(node), tail_of(norm)
        once = layer is not None and calls[layer] == calls[norm] == readers[node] == 1
        if once and tail is not None and not is_parametrized(layer):
            scale = norm.weight if norm.affine else torch.ones_like(norm.running_mean)
            shift = norm.bias if norm.affine else torch.zeros_like(norm.running_mean)
            layer.weight, layer.bias = fuse_conv_bn_weights(
                layer.weight,
                layer.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                scale,
                shift,
            )
            tails[norm] = tail
    for module in list(network.modules()):
        for name, child in module.named_children():
            if child in tails:
                setattr(module, name, tails[child])
    # A layer with a forward of its own may not be what its weights say: compare, don't trust.
    with torch.no_grad():
        wanted, got = before(example), network(example)
    return network if torch.allclose(got, wanted, rtol=1e-3, atol=1e-3) else copy.deepcopy(before)


def tail_of(norm):
    """Tell what is left of a folded BatchNorm: nothing, or the activation that timm puts into it.

    :return: the layer to put in its place; None if it can't be folded
    :rtype: torch.nn.Module
    """
    if norm.running_mean is None:
        return None  # statistics of each batch: no fixed map
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d":
        return nn.Sequential(norm.drop, norm.act)
    return None
