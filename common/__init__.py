"""What no paper mentions: devices, run folders, pictures, datasets, trained classifiers."""

import sys


def end_in_one_line(kind, error, trace):
    """Say what has ended a script; only what was no Ctrl-C deserves a traceback.

    Scripts import this first: importing torch takes seconds, in which nobody catches Ctrl-C yet.
    """
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.excepthook is sys.__excepthook__:  # who has a hook of his own keeps it
    sys.excepthook = end_in_one_line
