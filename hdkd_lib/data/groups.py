"""Which images belong together (one patient, lesion, slide) in a set that does not say so itself.

Either a table `groups.csv` in the set's folder, beside the classes, with the columns `image` (its path in the folder, as in an
audit's table) and `group` (any name), or a regular expression on that path, of which the parenthesised part is the name:
"patient(\\\\d+)", or "^[^/]+/([^/]+)/" for CLASS/PATIENT/IMAGE.
"""

import re
import warnings
from dataclasses import replace

import pandas as pd

from hdkd_lib.data.sources import Source


def with_groups(source: Source, pattern: str = "") -> Source:
    """The source with the groups that its groups.csv or `pattern` says, if one does; the card's `patients` says how.

    Raises:
        ValueError: the set has groups of its own and others are declared, table and pattern are both given, the pattern is none
            or does not fit every image, or the table lacks a column, has a row for no image, no row for an image, or two groups
            for one.
    """
    table = source.place / "groups.csv" if source.place else None
    table = table if table and table.is_file() else None
    if pattern and (source.groups or table):
        which = f"{table} says them" if table else f"{source.name} has them of its own"
        raise ValueError(f"groups={pattern!r} would say which images belong together, but {which}; pass one of them")
    if table:
        groups, how = _from_table(source, table), "declared in groups.csv"
    elif pattern:
        groups, how = _from_pattern(source, pattern), f"declared by the pattern {pattern}"
    else:
        groups, how = source.groups, "declared by the data set" if source.groups else "not known"
        if source.place and not source.groups:
            _point_at_folders(source)
    return replace(source, groups=groups, card=source.card | {"patients": how})


def _point_at_folders(source: Source) -> None:
    """Folders within a class may be patients."""
    above = 1 + (source.parts is not None)
    deeper = {tuple(i.split("/")[: above + 1]) for i in source.ids if i.count("/") > above}
    if len(deeper) > len({folder[:above] for folder in deeper}):
        warnings.warn(
            f"the images of a class lie in folders of their own, such as {'/'.join(min(deeper))}, and are not kept together: "
            f"if these are patients, pass groups={'^' + '[^/]+/' * above + '([^/]+)/'!r}",
            stacklevel=4,
        )


def _from_table(source: Source, file) -> list[str]:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a table ({error}); write two columns, image and group, as CSV") from error
    if missing := {"image", "group"} - set(table.columns):
        raise ValueError(f"{file} has no column {' and '.join(sorted(missing))}; its columns must be image and group")
    table["image"] = table.image.str.replace("\\", "/")
    if absent := sorted(set(table.image) - set(source.ids)):
        raise ValueError(
            f"{len(absent)} rows of {file} name no image, the first is {absent[0]!r}; images are named by their path beside "
            f"the table, such as {source.ids[0]!r}"
        )
    table = table[["image", "group"]].drop_duplicates()
    if len(twice := table[table.image.duplicated()]):
        raise ValueError(
            f"{len(twice)} images have two groups in {file}, the first is {twice.image.iloc[0]}; leave one row of each"
        )
    groups = dict(zip(table.image, table.group, strict=True))
    if without := [i for i in source.ids if not groups.get(i)]:
        raise ValueError(
            f"{len(without)} of {len(source.ids)} images have no group in {file}, the first is {without[0]}; add a row "
            "for each (an image that belongs to no other has a name of its own)"
        )
    return [groups[i] for i in source.ids]


def _from_pattern(source: Source, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"groups={pattern!r} is no regular expression ({error})") from error
    if compiled.groups != 1:
        raise ValueError(f"groups={pattern!r} must have one part in parentheses, which is the group's name")
    found = [compiled.search(i) for i in source.ids]
    if without := [i for i, match in zip(source.ids, found, strict=True) if not (match and match[1])]:
        raise ValueError(
            f"groups={pattern!r} fits {len(source.ids) - len(without)} of {len(source.ids)} images; it must fit all, and the "
            f"first that it does not fit is {without[0]}"
        )
    return [match[1] for match in found]
