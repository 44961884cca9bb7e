"""Tables of metrics: means over photos, as Markdown and as CSV."""

import numpy as np

from common.run import replacing, write_csv


def summarise(images, columns):
    """Average the metrics over photos.

    :param list[dict] images: the photos' records, each with "methods": metrics by method
    :param list[str] columns: which metrics; a photo may lack some, and all but the first methods
    :return: by method, by column, the mean, its standard error and the number of photos
    :rtype: dict[str, dict[str, tuple[float, float, int]]]
    """
    table = {}
    for name in images[0]["methods"]:
        rows = [image["methods"][name] for image in images if name in image["methods"]]
        table[name] = {}
        for column in columns:
            values = np.array([row[column] for row in rows if column in row], dtype=float)
            if len(values):
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
                table[name][column] = (float(values.mean()), float(error), len(values))
    return table


def to_markdown(table, columns, blind=()):
    """Write the means as Markdown, the best of each column in bold.

    Maps that are blind to the network can't win: that they never change is no merit.

    :param dict table: as from :func:`summarise`
    :param dict[str, str] columns: for each metric which end is the good one, "low" or "high"
    :param tuple[str] blind: methods that can't win
    :return: the table's lines
    :rtype: list[str]
    """
    present = [c for c in columns if c in next(iter(table.values()))]
    best = {}
    for column in present:
        means = [row[column][0] for name, row in table.items() if name not in blind]
        best[column] = (max if columns[column] == "high" else min)(means, default=None)
    lines = ["| method | " + " | ".join(present) + " |", "|---" * (len(present) + 1) + "|"]
    for name, row in table.items():
        cells = []
        for column in present:
            mean, error, count = row[column]
            text = f"{mean:.3f} ± {error:.3f}" if count > 1 else f"{mean:.3f}"
            text = f"{mean:.0f}" if column == "evaluations" else text
            won = name not in blind and mean == best[column]
            cells.append(f"**{text}**" if won else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def write_tables(folder, table, columns, blind=()):
    """Write the means as Markdown, see :func:`to_markdown`, and as CSV; print them.

    :param pathlib.Path folder: the run folder
    :param dict table: as from :func:`summarise`
    :param dict[str, str] columns: for each metric which end is the good one, "low" or "high"
    :param tuple[str] blind: methods that can't win
    """
    lines = to_markdown(table, columns, blind)
    csv = [
        {"method": name}
        | {f"{c}{end}": row[c][i] for c in row for i, end in enumerate(("", " error", " n"))}
        for name, row in table.items()
    ]
    with replacing(folder / "table.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_csv(folder / "table.csv", csv)
    print("\n".join(lines))
    high = [column for column, end in columns.items() if end == "high"]
    cannot = [name for name in blind if name in table]
    print(f"high is good in {', '.join(high) or 'none'}, low in the others"
          + f"; {', '.join(cannot)}: blind, can't win" * bool(cannot))  # fmt: skip
