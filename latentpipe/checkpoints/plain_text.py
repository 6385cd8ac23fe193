"""The text side of Stable Diffusion 1 and 2 in torch and tokenizers alone, for a command that draws and ends.

transformers takes longer to be imported than a picture takes to be drawn. What its `CLIPTextModel` and `CLIPTokenizer` compute
of a prompt is computed here too, bit for bit, by layers of the same names, so that adapters fit them. Only configs and tokenizer
files of exactly the known kind are taken (`plain_text`); every other goes to transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from latentpipe.checkpoints.model_files import STABLE_DIFFUSION
from latentpipe.utils.errors import UserError
from latentpipe.utils.reading import read_json

_ACTIVATIONS = {
    "gelu": functional.gelu,
    "quick_gelu": lambda values: values * torch.sigmoid(1.702 * values),
}
_CONFIG = {  # fields of a text encoder's config that are read, or that change nothing in what it computes of a prompt
    "architectures", "attention_dropout", "bos_token_id", "dropout", "dtype", "eos_token_id", "hidden_act", "hidden_size",
    "initializer_factor", "initializer_range", "intermediate_size", "layer_norm_eps", "max_position_embeddings", "model_type",
    "num_attention_heads", "num_hidden_layers", "pad_token_id", "projection_dim", "torch_dtype", "transformers_version",
    "vocab_size", "_name_or_path",
}  # fmt: skip
_READ = ("hidden_act", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
         "num_hidden_layers", "vocab_size", "eos_token_id")  # fmt: skip
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


class PlainTextEncoder(nn.Module):
    """Token ids (B L) to their embeddings (B L D) and the pooled ones (B D), as transformers' `CLIPTextModel` in eval mode."""

    embeddings: Any
    encoder: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.config = SimpleNamespace(**config)
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(config["vocab_size"], width)
        self.embeddings.position_embedding = nn.Embedding(config["max_position_embeddings"], width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config, eps) for _ in range(config["num_hidden_layers"]))
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.final_layer_norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_layer_norm.weight.device

    def get_input_embeddings(self) -> Any:
        """The layer that gives each token its vector, as transformers' method."""
        return self.embeddings.token_embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of the last layer behind its norm, and those of the token that ends each text."""
        places = torch.arange(input_ids.shape[-1], device=input_ids.device).expand(1, -1)
        values = self.embeddings.token_embedding(input_ids) + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            values = layer(values)
        values = self.final_layer_norm(values)
        end = self.config.eos_token_id  # 2 stands in old configs, whose end is the largest token
        ends = input_ids.int().argmax(-1) if end == 2 else (input_ids == end).int().argmax(-1)
        return values, values[torch.arange(len(values), device=values.device), ends]


class _Layer(nn.Module):
    """Causal attention, then the two linear layers, each behind a norm and beside what came in."""

    mlp: Any

    def __init__(self, config: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.activation = config["num_attention_heads"], _ACTIVATIONS[config["hidden_act"]]
        self.self_attn = nn.Module()
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.self_attn.add_module(name, nn.Linear(width, width))
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = values + self._attention(self.layer_norm1(values))
        return values + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(values))))

    def _attention(self, values: torch.Tensor) -> torch.Tensor:
        heads: Any = self.self_attn
        shape = (*values.shape[:2], self.heads, -1)
        queries, keys, read = (layer(values).view(shape).transpose(1, 2) for layer in (heads.q_proj, heads.k_proj, heads.v_proj))
        found = functional.scaled_dot_product_attention(
            queries, keys, read, is_causal=values.shape[1] > 1, scale=queries.shape[-1] ** -0.5
        )
        return heads.out_proj(found.transpose(1, 2).contiguous().reshape(values.shape))


class PlainTokenizer:
    """The calls of transformers' `CLIPTokenizer` that a Stable Diffusion pipeline makes.

    A call takes one text or several, and `padding` ("max_length", "longest" or none), `truncation`, `max_length`,
    `add_special_tokens`, `return_tensors` ("pt" or None) and `return_offsets_mapping`, and gives `input_ids`, `attention_mask`
    and `offset_mapping`.
    """

    def __init__(self, folder: Path, length: int) -> None:
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model_max_length, self.name_or_path = length, str(folder)
        self._end = self._tokenizer.token_to_id(END)
        self._pad = {"pad_id": self._end, "pad_token": END}
        self.added_tokens_encoder = {text: self._tokenizer.token_to_id(text) for text in (BEGIN, END)}

    def __call__(
        self,
        text: str | Sequence[str],
        padding: str | bool = False,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
    ) -> Any:
        length = max_length or self.model_max_length
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if truncation:
            self._tokenizer.enable_truncation(length)
        if padding == "max_length":
            self._tokenizer.enable_padding(length=length, **self._pad)
        elif padding:
            self._tokenizer.enable_padding(**self._pad)
        texts = [text] if isinstance(text, str) else list(text)
        read = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        fields: dict[str, Any] = {"input_ids": [each.ids for each in read], "attention_mask": [e.attention_mask for e in read]}
        if return_offsets_mapping:
            fields["offset_mapping"] = [each.offsets for each in read]
        if return_tensors == "pt":
            fields = {name: torch.tensor(rows) for name, rows in fields.items()}
        elif isinstance(text, str):
            fields = {name: rows[0] for name, rows in fields.items()}
        return SimpleNamespace(**fields)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without begin, end and padding."""
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return self._tokenizer.encode(text, add_special_tokens=False).tokens

    def add_tokens(self, tokens: Sequence[Any]) -> int:
        """Read these (`tokenizers.AddedToken`) as one token each; returns how many are new."""
        count = int(self._tokenizer.add_tokens(list(tokens)))
        self.added_tokens_encoder |= {token.content: self._tokenizer.token_to_id(token.content) for token in tokens}
        return count

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """The numbers of tokens that there are."""
        return [self.get_vocab()[token] for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their numbers."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: Any) -> str:
        """The text of token ids, the marks of begin and end among them."""
        return self._tokenizer.decode([int(one) for one in ids], skip_special_tokens=False).replace("</w>", " ").strip()

    def batch_decode(self, rows: Any) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row) for row in rows]


def plain_pipeline(cls: Any, folder: Path, scheduler: str, length: int, parts: Mapping[str, Any]) -> Any:
    """Stable Diffusion's pipeline of networks that were opened, its scheduler and a `PlainTokenizer`."""
    import diffusers

    return cls(
        **parts,
        tokenizer=PlainTokenizer(folder / "tokenizer", length),
        scheduler=getattr(diffusers, scheduler).from_pretrained(folder / "scheduler", local_files_only=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,  # it would only advise to have one
    )


def plain_text(model: Path, index: Mapping[str, Any]) -> int | None:
    """The tokens that a prompt may have, where a model's text side is of that kind, else None; `index`: its model_index.json.

    Every field that could change what is computed must be known: the names of the config's fields, the whole of the
    tokenizer's file but its vocabulary.
    """
    try:
        config = read_json(model / "text_encoder" / "config.json")
        options = read_json(model / "tokenizer" / "tokenizer_config.json")
        file = read_json(model / "tokenizer" / "tokenizer.json")
    except UserError:
        return None
    known = (
        _is_plain(index)
        and config.get("model_type") == "clip_text_model"
        and not set(config) - _CONFIG
        and all(name in config for name in _READ)
        and config["hidden_act"] in _ACTIVATIONS
        and _is_plain_tokenizer(options, file)
        and not (model / "tokenizer" / "added_tokens.json").exists()
    )
    return options["model_max_length"] if known else None


def _is_plain(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline is Stable Diffusion's of text encoder, UNet and VAE, with nothing beside."""
    names = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer", "unet": "UNet2DConditionModel"}
    sources = {name: (source or [None, None]) for name, source in index.items() if isinstance(source, list | None)}
    return (
        index.get("_class_name") == STABLE_DIFFUSION[0]
        and all(sources.get(part, [None, None])[1] == name for part, name in names.items())
        and all(sources.get(part, [None, None])[1] is None for part in ("safety_checker", "feature_extractor", "image_encoder"))
        and sources.get("scheduler", [None])[0] == "diffusers"
    )


def _is_plain_tokenizer(options: Mapping[str, Any], file: Mapping[str, Any]) -> bool:
    """Whether a tokenizer's two files say what transformers' `CLIPTokenizer` writes into them, and no more."""
    model = dict(file.get("model") or {})
    vocabulary = model.pop("vocab", None)
    model.pop("merges", None)
    if not isinstance(vocabulary, dict) or BEGIN not in vocabulary or END not in vocabulary:
        return False
    said = {name: value for name, value in options.items() if name not in ("backend", "model_max_length")}
    marks = [
        {"id": vocabulary[text], "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True} for text in (BEGIN, END)
    ]  # fmt: skip
    return (
        type(options.get("model_max_length")) is int
        and said
        == {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": END, "tokenizer_class": "CLIPTokenizer"}
        and sorted(file.get("added_tokens") or [], key=str) == sorted(marks, key=str)
        and {name: file.get(name) for name in _TOKENIZER} == _TOKENIZER
        and file.get("post_processor")
        == {"type": "RobertaProcessing", "sep": [END, vocabulary[END]], "cls": [BEGIN, vocabulary[BEGIN]],
            "trim_offsets": False, "add_prefix_space": False}
        and model == _MODEL
    )  # fmt: skip


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_TOKENIZER = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ],
    },
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Removed", "invert": True}, _BYTES],
    },
    "decoder": {**_BYTES, "add_prefix_space": True},
}
_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": END,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "</w>",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
