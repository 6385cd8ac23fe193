"""The emoji set: Noto Color Emoji rendered with captions, and its fixed split.

The font is Debian's package fonts-noto-color-emoji (SIL Open Font Licence 1.1). Captions come from the
names in the `emoji` package. The split ships in emoji_split.json: a plain validation share, and
held-out combinations of role x gender x skin tone that nothing is ever trained on.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from latentpipe.utils.errors import LatentpipeWarning, UserError
from latentpipe.utils.images import WHITE
from latentpipe.utils.io import atomic_folder, read_json

FONT_SIZE = 109  # the one size of the font's bitmaps: 136 x 128
FONTS = (
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
)
TONES = ("light", "medium light", "medium", "medium dark", "dark")
GENDERS = ("person", "woman", "man")
SPLITS = ("train", "validation", "held_out")
SPLIT_FILE = Path(__file__).with_name("emoji_split.json")

_TONE = re.compile(r"^(?P<rest>.*?) (?P<tone>(?:medium )?(?:light|dark)|medium) skin tone(?P<tail>.*)$")


@dataclass(frozen=True)
class Emoji:
    """One distinct picture: its sequences, a caption for each, and the picture (square RGB on white)."""

    sequences: tuple[str, ...]
    captions: tuple[str, ...]
    picture: Image.Image

    @property
    def key(self) -> str:
        """Code points of the first sequence, as in ``1f468-200d-1f692``; a file name and the split's key."""
        return "-".join(f"{ord(char):x}" for char in self.sequences[0])


@dataclass(frozen=True)
class Combination:
    """What a caption says about a person: role x gender x skin tone ("" for none)."""

    role: str
    gender: str
    tone: str


def find_font(path: Path | None = None) -> Path:
    """The Noto Color Emoji font; UserError says how to get it."""
    for candidate in (path,) if path else FONTS:
        if candidate.is_file():
            return candidate
    raise UserError(
        f"No Noto Color Emoji font at {path or FONTS[0]}; on Debian and Ubuntu: apt-get install fonts-noto-color-emoji"
    )


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def caption_of(sequence: str, name: str) -> str:
    """A caption in plain lower-case words: ``:woman_firefighter_medium-dark_skin_tone:`` without its signs."""
    text = name.strip(":").replace("_", " ").replace("-", " ").replace("&", "and").replace("’", "'")
    text = unicodedata.normalize("NFKD", text)
    text = "".join(char for char in text if not unicodedata.combining(char)).lower()
    text = " ".join(re.sub(r"[^a-z0-9#*'! ]", " ", text).split())
    regional = all(0x1F1E6 <= ord(char) <= 0x1F1FF for char in sequence)
    tagged = any(0xE0020 <= ord(char) <= 0xE007F for char in sequence)
    return f"flag of {text}" if regional or tagged else text


def combination_of(caption: str) -> Combination:
    """Role, gender and tone that a caption names; the tone is empty where it names none, or two."""
    match = _TONE.match(caption)
    tone, rest = "", caption
    if match and "skin tone" not in match["tail"]:
        tone, rest = match["tone"], f"{match['rest']}{match['tail']}"
    words = rest.split()
    named = bool(words) and words[0] in GENDERS
    gender = words[0] if named else "person"
    role = " ".join(words[1:] if named else words)
    return Combination(role or "adult", gender, tone)


def render(sequence: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """One sequence as a 136 x 136 RGB picture on white; None where the font has no single glyph for it."""
    if font.getlength(sequence) > FONT_SIZE * 1.5:
        return None  # an unjoined sequence is drawn as several glyphs side by side
    canvas = Image.new("RGB", (136, 136), WHITE)
    draw = ImageDraw.Draw(canvas)
    left, top, right, bottom = font.getbbox(sequence)
    if right - left < 8 or bottom - top < 8:
        return None
    draw.text(((136 - 136) // 2 - left, (136 - (bottom - top)) // 2 - top), sequence, font=font, embedded_color=True)
    return canvas if np.asarray(canvas).min() < 250 else None


def render_all(font_path: Path | None = None) -> list[Emoji]:
    """Every fully qualified emoji that the font draws, one entry per distinct picture."""
    try:
        import emoji as names
    except ModuleNotFoundError:
        raise UserError("The names of the emoji come from the package 'emoji': pip install 'latentpipe[train]'") from None

    if not features.check("raqm"):
        raise UserError(
            "Pillow cannot join emoji sequences without raqm and FriBiDi; on Debian and Ubuntu: apt-get install libfribidi0"
        )
    font = ImageFont.truetype(str(find_font(font_path)), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    qualified = names.STATUS["fully_qualified"]
    groups: dict[bytes, tuple[list[str], list[str], Image.Image]] = {}
    missing = render("\U0010fffd", font)
    blank = missing.tobytes() if missing else b""
    for sequence, entry in sorted(names.EMOJI_DATA.items()):
        if entry["status"] != qualified:
            continue
        picture = render(sequence, font)
        if picture is None or picture.tobytes() == blank:
            continue
        sequences, captions, _ = groups.setdefault(picture.tobytes(), ([], [], picture))
        sequences.append(sequence)
        caption = caption_of(sequence, entry["en"])
        if caption not in captions:
            captions.append(caption)
    return [Emoji(tuple(sequences), tuple(captions), picture) for sequences, captions, picture in groups.values()]


def make_split(emojis: list[Emoji], font_hash: str) -> dict:
    """The rule behind emoji_split.json.

    Held out: for each role that exists in all 3 genders x 5 tones, one tone per gender in a Latin pattern,
    the same for a role and its mirror image ("facing right"), since training may flip pictures.
    Validation: of the rest, without pictures whose mirror image is another emoji, the one in 22 with the
    lowest sha256 of its key.
    """
    roles: dict[str, dict[tuple[str, str], Emoji]] = {}
    for emoji in emojis:
        combination = combination_of(emoji.captions[0])
        if combination.tone and len(emoji.captions) == 1:
            roles.setdefault(combination.role, {})[combination.gender, combination.tone] = emoji
    complete = {role: cells for role, cells in roles.items() if len(cells) == len(GENDERS) * len(TONES)}
    held_out: dict[str, str] = {}
    for row, base in enumerate(sorted({role.removesuffix(" facing right") for role in complete})):
        for column, gender in enumerate(GENDERS):
            tone = TONES[(row + 2 * column) % len(TONES)]
            for role in (base, f"{base} facing right"):
                if role in complete:
                    emoji = complete[role][gender, tone]
                    held_out[emoji.key] = emoji.captions[0]
    mirrored = mirror_twins(emojis)
    rest = [emoji for emoji in emojis if emoji.key not in held_out and emoji.key not in mirrored]
    rest.sort(key=lambda emoji: hashlib.sha256(emoji.key.encode()).hexdigest())
    validation = {emoji.key: emoji.captions[0] for emoji in rest[: len(rest) // 22]}
    return {"font_sha256": font_hash, "validation": validation, "held_out": held_out}


def _reduced(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32).ravel()


def mirror_twins(emojis: list[Emoji], threshold: float = 25.0) -> set[str]:
    """Keys of the pictures whose mirror image is (nearly) another emoji: mean squared error at 32 x 32 under `threshold`."""
    plain = np.stack([_reduced(emoji.picture) for emoji in emojis])
    mirror = np.stack([_reduced(ImageOps.mirror(emoji.picture)) for emoji in emojis])
    distance = np.square(mirror).sum(1)[:, None] + np.square(plain).sum(1)[None] - 2 * mirror @ plain.T
    np.fill_diagonal(distance, np.inf)
    return {emojis[index].key for index in np.flatnonzero(distance.min(1) / plain.shape[1] < threshold)}


def read_split() -> dict:
    """The shipped split: {"font_sha256", "validation": {key: caption}, "held_out": {key: caption}}."""
    return read_json(SPLIT_FILE)


def held_out_captions() -> frozenset[str]:
    """Every caption that no training of anything may see."""
    return frozenset(read_split()["held_out"].values())


def split_of(emoji: Emoji, split: dict) -> str:
    """ "train", "validation" or "held_out"; a held-out caption alone is enough, whatever the font."""
    for name in ("held_out", "validation"):
        if emoji.key in split[name]:
            return name
    return "held_out" if set(emoji.captions) & set(split["held_out"].values()) else "train"


def write_folders(out: Path, size: int, font_path: Path | None = None) -> dict[str, int]:
    """Render the set into ``out/{train,validation,held_out}``, PNG files with metadata.jsonl; return the counts."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder with --out, or delete it first.")
    split = read_split()
    if file_hash(find_font(font_path)) != split["font_sha256"]:
        warnings.warn(
            "this is another version of the font than the one that the split was made with", LatentpipeWarning, stacklevel=2
        )
    emojis = render_all(font_path)
    counts: dict[str, int] = {}
    for name in SPLITS:
        chosen = [emoji for emoji in emojis if split_of(emoji, split) == name]
        counts[name] = len(chosen)
        with atomic_folder(out / name) as folder:
            for emoji in chosen:
                emoji.picture.resize((size, size), Image.Resampling.LANCZOS).save(folder / f"{emoji.key}.png")
            lines = [{"file_name": f"{emoji.key}.png", "text": caption} for emoji in chosen for caption in emoji.captions]
            (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return counts
