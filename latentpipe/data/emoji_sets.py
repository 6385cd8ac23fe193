"""Several artists' emoji ("hands"), read from the npm packages that hold them and matched by code point.

Packages are fetched by hand (``npm pack NAME@VERSION``); nothing here uses a network. Iconify's hold one JSON of SVG bodies;
chars.json maps code points to names where the set has it, else a picture is found by its CLDR name.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from latentpipe.utils.errors import UserError
from latentpipe.utils.images import WHITE, flatten, picture_of
from latentpipe.utils.reading import parse_json

TONE_MARKS = frozenset(f"1f3f{digit}" for digit in "bcdef")
MOST_MEMBER = 2**26  # bytes of a file in a package
NAMES_PACKAGE = "emojibase-data@17.0.0"
GROUPS = ("smileys", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags")


@dataclass(frozen=True)
class Hand:
    """One artist's set: how captions name it, where it comes from, and what of it is used.

    package   name@version on npm; "" for Noto, which Debian's font draws
    family    hands that draw the same emoji alike, and are held out together
    trained   False: kept apart, for LoRA of a hand that the model never saw
    tones     whether its skin-tone variants are used; flags likewise
    margin    white border, as a share of the side, for sets that are drawn up to the edge
    """

    name: str
    style: str
    package: str
    family: str
    credit: str
    trained: bool = True
    tones: bool = False
    flags: bool = False
    margin: float = 0.0


HANDS = (
    Hand("noto", "", "", "noto", "Noto Color Emoji, Google, SIL OFL 1.1", tones=True, flags=True),
    Hand(
        "twemoji", "flat style", "@iconify-json/twemoji@1.2.5", "twemoji", "Twemoji, Twitter and contributors, CC BY 4.0",
        tones=True, flags=True, margin=1 / 32,
    ),
    Hand(
        "fluent", "fluent style", "@iconify-json/fluent-emoji-flat@1.2.6", "fluent", "Fluent Emoji, Microsoft, MIT"
    ),
    Hand("fluent-3d", "3d style", "@lobehub/fluent-emoji-3d@1.1.0", "fluent", "Fluent Emoji, Microsoft, MIT"),
    Hand(
        "noto-v1", "blob style", "@iconify-json/noto-v1@1.2.5", "noto-v1", "Noto Emoji before 2017, Google, Apache-2.0",
        margin=1 / 32,
    ),
    Hand(
        "emojitwo", "classic style", "@iconify-json/emojione@1.2.3", "emojitwo", "EmojiTwo and its contributors, CC BY 4.0",
        margin=1 / 32,
    ),
    Hand(
        "fxemoji", "firefox style", "@iconify-json/fxemoji@1.2.2", "fxemoji", "FxEmojis, Mozilla, CC BY 4.0", trained=False,
        margin=1 / 32,
    ),
    Hand(
        "streamline", "streamline style", "@iconify-json/streamline-emojis@1.2.4", "streamline",
        "Streamline Emojis, Webalys, CC BY 4.0", trained=False, margin=1 / 32,
    ),
)  # fmt: skip
ANY_STYLE = "any style"


@dataclass(frozen=True)
class Names:
    """What emojibase says of an emoji, by its code points: label, keywords and group."""

    labels: dict[str, str]
    tags: dict[str, tuple[str, ...]]
    groups: dict[str, str]


@dataclass
class HandSet:
    """The pictures of one hand: for each code point sequence (as `plain_key` writes it) how to draw it."""

    hand: Hand
    entries: dict[str, Any]
    icons: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    def draw(self, key: str, size: int) -> Image.Image:
        """The picture of a key, RGB on white, `size` x `size`; ValueError where it cannot be drawn."""
        inner = round(size * (1 - 2 * self.hand.margin))
        if self.files:
            picture = picture_of(self.files[self.entries[key]], ("WEBP", "PNG"))
            drawn = flatten(picture).resize((inner, inner), Image.Resampling.LANCZOS)
        else:
            drawn = flatten(render_svg(svg_of(self.icons, self.entries[key]), inner))
        canvas = Image.new("RGB", (size, size), WHITE)
        canvas.paste(drawn, ((size - drawn.width) // 2, (size - drawn.height) // 2))
        return canvas


def plain_key(key: str) -> str:
    """Code points joined by '-', lower case, without variation selectors, which sets write or leave out."""
    return "-".join(part.lstrip("0") for part in key.lower().split("-") if part != "fe0f")


def key_of(sequence: str) -> str:
    """`plain_key` of a string."""
    return plain_key("-".join(f"{ord(char):x}" for char in sequence))


def base_key(key: str) -> str:
    """A plain key without skin tones: what all tone variants of one emoji share."""
    return "-".join(part for part in key.split("-") if part not in TONE_MARKS)


def render_svg(svg: str, size: int) -> Image.Image:
    """An SVG as RGBA, as wide as `size` pixels; ValueError where it is not valid."""
    try:
        from resvg_py import svg_to_bytes
    except ModuleNotFoundError:
        raise UserError("SVG pictures are drawn by the package 'resvg-py': pip install 'latentpipe[train]'") from None
    return picture_of(svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)).convert("RGBA")


def svg_of(icons: dict[str, Any], name: str) -> str:
    """A whole SVG of an entry of an Iconify set; aliases are followed, mirrored where they say so."""
    flip = False
    for _ in range(5):
        if name in icons["icons"]:
            break
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            raise ValueError(f"the set has no icon '{name}'")
        flip ^= bool(alias.get("hFlip"))
        name = alias["parent"]
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    box = f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {box}>{body}</svg>'


def package_file(folder: Path, package: str) -> Path:
    """Where ``npm pack PACKAGE`` leaves its file: @scope/name@1.2.3 -> scope-name-1.2.3.tgz."""
    name, _, version = package.rpartition("@")
    return folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"


def check_packages(folder: Path) -> None:
    """UserError that names every package that is missing, and the command that fetches it."""
    packages = [hand.package for hand in HANDS if hand.package] + [NAMES_PACKAGE]
    missing = [package for package in packages if not package_file(folder, package).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(packages)} packages. Fetch them with:\n"
            f"  cd {folder} && npm pack {' '.join(missing)}"
        )


def read_members(path: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    """The files of a package (.tgz) whose names match, in memory; nothing is unpacked to the disk."""
    try:
        with tarfile.open(path, "r:gz") as archive:
            found = {}
            for member in archive:
                if member.isfile() and wanted.fullmatch(member.name):
                    if member.size > MOST_MEMBER:
                        raise UserError(f"{path}: {member.name} has {member.size:,} bytes; at most {MOST_MEMBER:,} are read.")
                    file = archive.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
            return found
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a package as 'npm pack' writes it ({error}); fetch it again.") from None


def read_names(folder: Path) -> Names:
    """Labels, keywords and groups of emojibase-data."""
    path = package_file(folder, NAMES_PACKAGE)
    members = read_members(path, re.compile(r"package/en/data\.json"))
    if not members:
        raise UserError(f"{path} holds no package/en/data.json; fetch {NAMES_PACKAGE} again.")
    names = Names({}, {}, {})
    for entry in _json_of(path, next(iter(members.values()))):
        key = plain_key(entry["hexcode"])
        names.labels[key] = entry["label"]
        names.tags[key] = tuple(entry.get("tags", ()))
        names.groups[key] = GROUPS[entry["group"]] if "group" in entry else ""
        for skin in entry.get("skins", ()):
            names.labels[plain_key(skin["hexcode"])] = skin["label"]
            names.groups[plain_key(skin["hexcode"])] = names.groups[key]
    return names


def read_hand(folder: Path, hand: Hand, labels: dict[str, list[str]], known: HandSet | None = None) -> HandSet:
    """The pictures that a hand has among the keys of `labels` (the names that each may go by).

    known   a set whose keys alone are taken (Fluent 3D: what Microsoft did not release is somebody else's drawing)
    """
    path = package_file(folder, hand.package)
    if "lobehub" in hand.package:
        files = read_members(path, re.compile(r"package/assets/[0-9a-f-]+\.webp"))
        found: dict[str, Any] = {plain_key(Path(name).stem): name for name in files}
        taken = {key: found[key] for key in labels if key in found and (known is None or key in known.entries)}
        return HandSet(hand, taken, files=files)
    members = read_members(path, re.compile(r"package/(icons|chars)\.json"))
    if "package/icons.json" not in members:
        raise UserError(f"{path} holds no package/icons.json; fetch {hand.package} again.")
    icons = _json_of(path, members["package/icons.json"])
    chars = {plain_key(key): name for key, name in _json_of(path, members.get("package/chars.json", b"{}")).items()}
    if not chars:  # older sets: by name, however its words are joined
        slugs = {name.replace("-", ""): name for name in [*icons.get("aliases", {}), *icons["icons"]]}
        found = {key: [slugs[slug] for slug in map(slug_of, texts) if slug in slugs] for key, texts in labels.items()}
        chars = {key: names[0] for key, names in found.items() if names}
    entries = {key: chars[key] for key in labels if key in chars}
    return HandSet(hand, entries, icons=icons)


def _json_of(path: Path, data: bytes) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"), most=MOST_MEMBER)
    except ValueError as error:
        raise UserError(f"{path} holds JSON that cannot be read ({error}); fetch it again.") from None


def slug_of(label: str) -> str:
    """A name's letters and digits: ``Woman: red hair`` -> ``womanredhair``; sets join words in different ways."""
    return re.sub(r"[^a-z0-9]+", "", label.lower().replace("&", "and"))
