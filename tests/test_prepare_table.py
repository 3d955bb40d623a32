"""A table of one's own: CSV, TSV, Parquet, lists; and all that can be wrong with one at once."""

import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from preparing import picture, prepare, write

from clsl_jax.data import sources, stored
from clsl_jax.data.formats import table

CLASSES = ("cat", "dog", "tree")


def _load(out, **options):
    return sources.load_prepared(sources.find_prepared("table", out), image_size=10, **options)


def _rows(count=200, unknown=0.3):
    draws = np.random.RandomState(0)
    labels = (draws.random_sample((count, 3)) < (0.5, 0.2, 0.05)).astype(int).astype(str)
    labels[draws.random_sample((count, 3)) < unknown] = ""
    return [[f"photos/{row:03d}.jpg", *labels[row]] for row in range(count)]


def _folder(root, rows, header=("image", *CLASSES)):
    for number, row in enumerate(rows):
        write(root / row[0], picture(number))
    lines = [",".join(line) for line in (header, *rows)]
    # As a spreadsheet saves it: byte order mark and Windows line ends.
    write(root / "labels.csv", ("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    return root


def test_two_hundred_rows_with_unknown_cells(tmp_path):
    rows = _rows()
    source = _folder(tmp_path / "mine", rows)
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert status == 0, errors
    assert "No split for testing: 40 images held out, by label, seed 0." in shown
    assert "No image is missing, unreadable, damaged or there twice." in shown
    dataset = _load(out, validation_fraction=0.0)
    assert dataset.class_names == CLASSES
    assert (len(dataset.train.ids), len(dataset.test.ids)) == (160, 40)
    expected = {row[0]: [int(cell or -1) for cell in row[1:]] for row in rows}
    for split in (dataset.train, dataset.test):
        for name, labels in zip(split.ids, split.labels, strict=True):
            assert labels.tolist() == expected.pop(name)
    assert not expected
    every = np.concatenate([dataset.train.labels, dataset.test.labels])
    for value in (1, 0):
        share = (every == value).sum(axis=0) * 0.2
        assert np.abs((dataset.test.labels == value).sum(axis=0) - share).max() <= 2


def test_planted_errors_are_all_reported_at_once(tmp_path):
    rows = _rows()
    source = _folder(tmp_path / "mine", rows)
    rows[7][1] = "2"
    rows[7][3] = "yes"
    rows[63][0] = "photos/gone.jpg"
    rows[120][2] = "o"
    rows[199][0] = rows[5][0]
    (source / rows[130][0]).write_bytes(b"no image")
    lines = "\n".join(",".join(line) for line in (("image", *CLASSES), *rows))
    path = write(source / "labels.csv", lines)
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert status == 2
    assert shown == ""
    assert errors == (
        f"error: {path}: 6 cells cannot be used:\n"
        "  row 9, column 'cat': '2'; expected 1, 0 or an empty cell\n"
        "  row 9, column 'tree': 'yes'; expected 1, 0 or an empty cell\n"
        "  row 65, column 'image': 'photos/gone.jpg'; no such file; expected the path of an image "
        f"below {source}\n"
        "  row 122, column 'dog': 'o'; expected 1, 0 or an empty cell\n"
        "  row 132, column 'image': 'photos/130.jpg'; the file is damaged (of no image "
        "format that is known); expected an image\n"
        "  row 201, column 'image': 'photos/005.jpg'; row 7 has the same image; expected one row "
        "for each image\n"
    )
    assert not out.exists()


HEADER = "Path;Split;A;B;note\n"


@pytest.mark.parametrize("cells", ["", "yes/no,true/false,?,-1"])
def test_words_are_understood_if_asked_for(tmp_path, cells):
    lines = ("a.png;train;Yes;0;x", "b.png;VAL;?;True;", "c.png;test;-1;no;", "d.png;test;;1.0;")
    for number, name in enumerate("abcd"):
        write(tmp_path / f"{name}.png", picture(number, file_format="PNG"))
    path = write(tmp_path / "t.csv", HEADER + "\n".join(lines) + "\n")
    options = {
        "words": cells.split(",") if cells else (),
        "columns": table.Columns(ignored=("note",)),
    }
    if not cells:
        with pytest.raises(ValueError, match="5 cells cannot be used") as error:
            table.read_own_table(path, **options)
        assert "row 3, column 'A': '?'; expected 1, 0 or an empty cell" in str(error.value)
        return
    found = table.read_own_table(path, **options)
    assert found.class_names == ("A", "B")
    assert {split: part.ids for split, part in found.splits.items()} == {
        "train": ["a.png"],
        "validation": ["b.png"],
        "test": ["c.png", "d.png"],
    }
    assert found.splits["train"].labels.tolist() == [[1, 0]]
    assert found.splits["validation"].labels.tolist() == [[-1, 1]]
    assert found.splits["test"].labels.tolist() == [[-1, 0], [-1, 1]]
    with pytest.raises(ValueError, match="expected 1, 0, yes, no, true, false"):
        table.read_own_table(path, words=cells.split(","))


def test_a_column_that_is_no_class_is_not_listed_cell_by_cell(tmp_path):
    rows = "\n".join(f"{n}.jpg,{n + 2},1" for n in range(60))
    path = write(tmp_path / "t.csv", f"image,weight,cat\n{rows}\n")
    with pytest.raises(ValueError, match="60 cells cannot be used") as error:
        table.read_own_table(path, may_miss=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 53
    assert lines[-2].endswith("… and 10 more in column 'weight'")
    assert lines[-1] == (
        "If column 'weight' is no class: --ignore_columns=weight; if it lists the labels of an "
        "image: --labels_column=weight"
    )


def test_words_in_the_cells_are_met_with_the_flag_that_reads_them(tmp_path):
    path = write(tmp_path / "t.csv", "image,cat,dog\na.jpg,yes,0\nb.jpg,?,no\n")
    with pytest.raises(ValueError, match="3 cells cannot be used") as error:
        table.read_own_table(path, may_miss=True)
    last = str(error.value).splitlines()[-1]
    assert last == "If that is what these cells mean: --cells='yes/no,?'"
    found = table.read_own_table(path, may_miss=True, words=["yes/no", "?"])
    assert found.splits["train"].labels.tolist() == [[1, 0], [-1, 0]]


def test_a_slip_of_the_pen_is_met_with_no_advice(tmp_path):
    path = write(tmp_path / "t.csv", "image,cat\na.jpg,1\nb.jpg,0\nc.jpg,maybe\n")
    with pytest.raises(ValueError, match="1 cell cannot be used") as error:
        table.read_own_table(path, may_miss=True)
    assert str(error.value).splitlines()[1:] == [
        "  row 4, column 'cat': 'maybe'; expected 1, 0 or an empty cell"
    ]


def test_parquet_and_tsv_say_the_same(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jpg", picture(number))
    columns = {
        "file": ["0.jpg", "1.jpg", "2.jpg"],
        "int": [1, None, 0],
        "float": [1.0, float("nan"), 0.0],
        "bool": [True, None, False],
        "text": ["1", "", "0"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    write(
        tmp_path / "t.tsv",
        "file\tint\tfloat\tbool\ttext\n0.jpg\t1\t1.0\t1\t1\n1.jpg\t\t\t\t\n2.jpg\t0\t0.0\t0\t0\n",
    )
    found = [table.read_own_table(tmp_path / name) for name in ("t.parquet", "t.tsv")]
    for one in found:
        assert one.class_names == ("int", "float", "bool", "text")
        assert one.splits["train"].labels.tolist() == [[1] * 4, [-1] * 4, [0] * 4]
    with pytest.raises(ValueError, match=r"found t.parquet, t.tsv; give --source=FILE"):
        table.read_own_table(tmp_path)


def test_lists_of_labels(tmp_path):
    path = write(tmp_path / "t.csv", 'image,labels\na.jpg,"dog| cat"\nb.jpg,\nc.jpg,tree\n')
    columns = table.Columns(labels="labels", separator="|")
    found = table.read_own_table(path, columns=columns, may_miss=True)
    assert found.class_names == ("cat", "dog", "tree")
    assert found.splits["train"].labels.tolist() == [[1, 1, 0], [-1, -1, -1], [0, 0, 1]]
    found = table.read_own_table(path, columns=columns, may_miss=True, unlisted="unknown")
    assert found.splits["train"].labels.tolist() == [[1, 1, -1], [-1, -1, -1], [-1, -1, 1]]
    found = table.read_own_table(path, columns=columns, may_miss=True, empty="negative")
    assert found.splits["train"].labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    names = write(tmp_path / "names.txt", "tree\ndog\n")
    with pytest.raises(ValueError, match=r"row 2, column 'labels': 'dog\| cat'; 'cat' is not in"):
        table.read_own_table(path, columns=columns, may_miss=True, class_names=names)
    write(names, "tree\ncat\ndog\ntree\n")
    with pytest.raises(ValueError, match=r"names.txt: 1 classes listed twice: tree\."):
        table.read_own_table(path, columns=columns, may_miss=True, class_names=names)
    with pytest.raises(ValueError, match="found none; give --source=FILE"):
        table.read_own_table(tmp_path / ("long" * 99))


def test_an_empty_cell_may_say_that_a_thing_is_not_there(tmp_path):
    path = write(tmp_path / "t.csv", "image,cat,dog\na.jpg,1,\nb.jpg,?,1\nc.jpg,,\n")
    for empty, labels in (
        ("unknown", [[1, -1], [-1, 1], [-1, -1]]),
        ("negative", [[1, 0], [-1, 1], [0, 0]]),
    ):
        found = table.read_own_table(path, words=("?",), may_miss=True, empty=empty)
        assert found.splits["train"].labels.tolist() == labels


@pytest.mark.parametrize(
    ("content", "columns", "name"),
    [
        ("path,image,cat\na.jpg,1,0\n", table.Columns(image="path"), "image"),
        ("image,labels\na.jpg,cat;split\n", table.Columns(labels="labels"), "split"),
    ],
)
def test_a_class_is_not_called_as_a_column_of_what_a_run_writes(tmp_path, content, columns, name):
    """Its recovered.csv would have two columns of one name, which nothing reads."""
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(ValueError, match=f"t.csv: a class is called '{name}'.*another name"):
        table.read_own_table(path, columns=columns, may_miss=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no header"),
        ("image,a\n", "no rows"),
        ("image,a,a\nx.jpg,1,1\n", "two columns of the name 'a'"),
        ("image,a\nx.jpg,1\ny.jpg\nz.jpg,1,0\n", "row 3 has 1 cells, row 4 has 3 cells"),
        ("picture,a\nx.jpg,1\n", "--image_column. Its columns are 'picture', 'a'"),
        ("image\nx.jpg\n", "has no class"),
        ("image,split,a\nx.jpg,tset,1\n", "'tset'; expected train, validation or test"),
        (b"image,caf\xe9\nx.jpg,1\n", "not UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, content, expected):
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        table.read_own_table(path, may_miss=True)
    assert str(path) in str(error.value)


def test_commas_at_the_ends_of_lines_are_no_columns(tmp_path):
    path = write(tmp_path / "t.csv", "image,a,,\nx.jpg,1,,\n,,,\n")
    assert table.read_own_table(path, may_miss=True).class_names == ("a",)


def test_a_table_of_positives_alone_is_noted_before_anything_is_trained(tmp_path):
    source = _folder(tmp_path / "mine", [["a.jpg", "1", "", ""], ["b.jpg", "1", "1", ""]])
    flags = ("--dataset=table", f"--source={source}", "--check-only", "--test_fraction=0.5")
    told = "Note: No training label says that something is absent."
    for more, expected in (((), True), (("--empty=negative",), False)):
        status, shown, errors = prepare(*flags, *more)
        assert status == 0, errors
        assert (told in " ".join(shown.split())) is expected


def test_a_changed_table_does_not_pass_for_the_prepared_one(tmp_path):
    source = _folder(tmp_path / "mine", [["a.jpg", "1", "0", ""], ["b.jpg", "1", "1", ""]])
    flags = ("--dataset=table", f"--source={source}", f"--out={tmp_path}", "--test_fraction=0.5")
    for _ in range(2):
        status, shown, errors = prepare(*flags)
        assert status == 0, errors
        assert "2 images." in shown
    write(source / "labels.csv", "image,cat,dog,tree\na.jpg,1,0,\nb.jpg,1,1,1\n")
    status, _, errors = prepare(*flags)
    assert status == 2
    assert "holds other images or labels: delete it" in errors
    assert stored.open_prepared(sources.find_prepared("table", tmp_path)).class_names == CLASSES


def test_class_names_need_lists(tmp_path):
    with pytest.raises(ValueError, match="--labels_column"):
        table.read_own_table(tmp_path, class_names=tmp_path / "names.txt")
