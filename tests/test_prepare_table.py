"""A table of one's own: CSV, TSV, Parquet, lists; and all that can be wrong with one at once."""

import os
import re
import shlex

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from preparing import picture, prepare, write

from clsl_jax.data import sources, stored
from clsl_jax.data.formats import table
from clsl_jax.data.label_file import read_label_file
from clsl_jax.errors import InputError

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


def test_the_advice_on_columns_with_commas_in_their_names_can_be_followed(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.jpg", picture(number))
    rows = "\n".join(f'{n}.jpg,{n}.5,"{n} ""m""",{n % 2}' for n in range(4))
    path = write(tmp_path / "t.csv", f'image,"place, x","a ""b""",cat\n{rows}\n')
    command = ("--dataset=table", f"--source={path}", "--check-only")
    status, _, errors = prepare(*command)
    assert status == 2
    advised = re.search(r"--ignore_columns=\S.*?(?=; if)", errors)[0]
    status, shown, errors = prepare(*command, *shlex.split(advised), "--test_fraction=0.5")
    assert (status, errors) == (0, "")
    assert "1 classes" in shown


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


@pytest.mark.parametrize(
    ("words", "cells", "expected"),
    [
        (["x=1"], "x X 1 0 x", [1, 1, 1, 0, 1]),
        (["ja=1", "nein=0", "NA=?"], "Ja nein na N/A 1", None),
        (["JA = 1", "nein=0", "na=?", "n/a=?"], "Ja nein na N/A 1", [1, 0, -1, -1, 1]),
        (["100%=1", "0%=0", "yes/no"], "100% 0% yes no 0", [1, 0, 1, 0, 0]),
        (["-1=0"], "-1 -1.0 1 0 0", [0, 0, 1, 0, 0]),
        ([], "1,0 0,00 1. 0.0 1,", [1, 0, 1, 0, 1]),
        (["-1"], "-1,0 -1. 1 0 0", [-1, -1, 1, 0, 0]),
    ],
)
def test_words_of_ones_own_and_numbers_as_programs_write_them(tmp_path, words, cells, expected):
    rows = "".join(f"{n}.jpg;{cell}\n" for n, cell in enumerate(cells.split()))
    path = write(tmp_path / "t.csv", f"image;cat\n{rows}")
    if expected is None:
        with pytest.raises(InputError, match=r"'N/A'; expected 1, 0, ja, nein, na or an empty"):
            table.read_own_table(path, words=words, may_miss=True)
        return
    found = table.read_own_table(path, words=words, may_miss=True)
    assert found.splits["train"].labels[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["x=2"], "--cells='x=2' is unknown; choose of yes/no, true/false, ?, -1, or say what"),
        (["=1"], "--cells='=1' is unknown"),
        (["1=0"], "--cells='1=0': '1' has another meaning already"),
        (["yes/no", "No=?"], "--cells='No=?': 'no' has another meaning already"),
    ],
)
def test_words_that_mean_nothing_or_two_things(tmp_path, words, expected):
    path = write(tmp_path / "t.csv", "image,cat\na.jpg,1\n")
    with pytest.raises(InputError, match=re.escape(expected)):
        table.read_own_table(path, words=words, may_miss=True)


TOLD = "Say what these words mean, 1, 0 or ? (unknown), perhaps so: --cells="


@pytest.mark.parametrize(
    ("rows", "hints"),
    [
        ("x,,n\n,X,n\n", [f"{TOLD}'n=0,X=1'"]),
        ("ja,nein,ja\nNEIN,,NA\n", [f"{TOLD}'ja=1,NA=?,nein=0'"]),
        ("N/A,1,0\n", [f"{TOLD}'N/A=?'"]),
        ("3,0,1\n3,3,0\n", [f"{TOLD}'3=?'"]),
        ("Yes,yes,no\nfehlt,fehlt,1\n", [f"{TOLD}'yes/no,fehlt=0'"]),
        # A note for each image, and the row of sums below a table.
        (
            "x,x,dark\nx,,blurred\n12,10,bright\n",
            [
                f"{TOLD}'x=1'",
                (
                    "If column 'tree' is no class: --ignore_columns=tree; if it lists the labels "
                    "of an image: --labels_column=tree"
                ),
            ],
        ),
        (
            'a b,c,1\n"a, b",d,0\n',
            [
                (
                    "If columns 'cat', 'big dog' are no classes: --ignore_columns='cat,big dog'; "
                    "if one lists the labels of an image: --labels_column=cat"
                )
            ],
        ),
        # Nothing of this can be copied into a command.
        ("\u200b,\u200b,1\n,1,0\n1,,0\n1,,0\n0,0,1\n", []),
    ],
)
def test_advice_on_the_words_in_the_cells(tmp_path, rows, hints):
    lines = "".join(f"{n}.jpg,{row}\n" for n, row in enumerate(rows.splitlines()))
    path = write(tmp_path / "t.csv", f"image,cat,big dog,tree\n{lines}")
    with pytest.raises(InputError, match="cannot be used") as error:
        table.read_own_table(path, may_miss=True)
    told = [line for line in str(error.value).splitlines()[1:] if not line.startswith("  row")]
    assert told == hints


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


def test_lists_of_parquet_are_lists_of_labels(tmp_path):
    path = tmp_path / "t.parquet"

    def save(lists):
        columns = {"image": ["a.jpg", "b.jpg", "c.jpg"], " tags ": lists}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    save([["dog", "cat"], [], ["tree", None]])
    columns = table.Columns(labels="tags")
    found = table.read_own_table(path, columns=columns, may_miss=True)
    assert found.class_names == ("cat", "dog", "tree")
    assert found.splits["train"].labels.tolist() == [[1, 1, 0], [-1, -1, -1], [0, 0, 1]]
    save([["dog; small"], [], []])
    with pytest.raises(InputError, match=r"t.parquet cannot be read .*a list has 'dog; small'"):
        table.read_own_table(path, columns=columns, may_miss=True)


def test_lists_as_a_program_prints_them_are_refused(tmp_path):
    """Or each bracket and quote would be of a class's name."""
    lists = ["['dog', 'cat']", '[""tree""]', "[]", "[dog]", "dog; [cat]"]
    rows = "".join(f'{n}.jpg,"{labels}"\n' for n, labels in enumerate(lists))
    path = write(tmp_path / "t.csv", f"image,tags\n{rows}")
    with pytest.raises(InputError, match="3 cells cannot be used") as error:
        table.read_own_table(path, columns=table.Columns(labels="tags"), may_miss=True)
    assert str(error.value).splitlines()[1:] == [
        f"  row {row}, column 'tags': {cell!r}; expected labels with ';' between them, no brackets"
        for row, cell in ((2, "['dog', 'cat']"), (3, '["tree"]'), (4, "[]"))
    ]


@pytest.mark.parametrize(
    ("lists", "separator", "told"),
    [
        (["cat, dog", "dog, tree", "cat"], ";", (";", 3, 2, ",")),
        (["cat, dog", "dog, tree", "cat"], ",", None),
        (["cat, small", "dog;tree", "cat, small"], ";", None),
        (["cat|dog", "dog|tree|cat"], ",", (",", 2, 2, "|")),
        (["cat, dog", "tree", "cat"], ";", None),
    ],
)
def test_lists_of_another_separator_are_noted(tmp_path, lists, separator, told):
    rows = "".join(f'{n}.jpg,"{labels}"\n' for n, labels in enumerate(lists))
    path = write(tmp_path / "t.csv", f"image,labels\n{rows}")
    columns = table.Columns(labels="labels", separator=separator)
    found = table.read_own_table(path, columns=columns, may_miss=True)
    expected = "None of the {1} label lists has the separator {0!r}, but {2} have {3!r}. If it "
    expected += "separates labels: --label_separator={3!r}"
    assert found.notes == ([expected.format(*told)] if told else [])
    with pytest.raises(InputError, match="--label_separator is empty"):
        table.read_own_table(path, columns=table.Columns(labels="labels", separator=""))


@pytest.mark.parametrize("cells", ["1 0 ", "0,0 1,0 1,0", "Yes no "])
def test_a_column_of_one_class_is_no_column_of_lists(tmp_path, cells):
    rows = "".join(f"{n}.jpg;{cell}\n" for n, cell in enumerate(cells.split(" ")))
    path = write(tmp_path / "t.csv", f"image;cat\n{rows}")
    columns = table.Columns(labels="cat", separator="|")
    with pytest.raises(
        InputError, match=r"t\.csv: column 'cat' \(--labels_column\) lists no labels"
    ):
        table.read_own_table(path, columns=columns, may_miss=True)
    names = write(tmp_path / "names.txt", "\n".join(cell for cell in cells.split(" ") if cell))
    if "1,0" not in cells:
        found = table.read_own_table(path, columns=columns, may_miss=True, class_names=names)
        assert found.class_names == tuple(cells.split())


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
        (
            "image,a,a\nx.jpg,1,1\n",
            (
                "two columns of the name 'a'; its columns are 'image', 'a', 'a' (its first row). "
                "Each needs a name of its own. If that row does not name the columns, delete it"
            ),
        ),
        ("My labels,,\nimage,a,b\nx.jpg,1,1\n", "its columns are 'My labels', '', '' (its first"),
        (
            "My labels\nimage;a;b\nx.jpg;1;0\ny.jpg;1;0\n",
            (
                "has 1 columns by its first row ('My labels'), separated by semicolons, but row 2 "
                "has 3 cells, row 3 has 3 cells, row 4 has 3 cells. If that row does not name the "
                "columns, delete it, or write one that does above it."
            ),
        ),
        ("x.jpg,1,0\ny.jpg,0,1\n", "Its columns are 'x.jpg', '1', '0' (its first row)."),
        (
            "image;a\nx.jpg;1\ny.jpg;1;0\n",
            "('image', 'a'), separated by semicolons, but row 3 has 3",
        ),
        ("image,a,\nx.jpg,1,note\n", "column 3 has no name; its columns are 'image', 'a', ''"),
        ('image,a\nx.jpg,1\ny.jpg,"1\nz.jpg,1\n', "quote that is opened in line 3 is not closed"),
        ('sep=;\r\nimage;"a\r\nb"\r\nx.jpg;"1', "quote that is opened in line 4 is not closed"),
        ('"image,a\nx.jpg,1\n', "quote that is opened in line 1 is not closed"),
        (
            'image,a\nx.jpg,1\ny.jpg,"' + 20000 * "1,1\nz.jpg,0\n",
            "limit (131072)): is a double quote not closed that is opened in line 3, or below?",
        ),
        (
            "image,a\nx.jpg,1\ny.jpg\nz.jpg,1,0\n",
            "row 3 has 1 cells, row 4 has 3 cells. A cell that contains the separator must be in",
        ),
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


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (
            'image;"Katze, Kater, Kätzchen, alle";dog\na.jpg;1;0\n',
            ["Katze, Kater, Kätzchen, alle", "dog"],
        ),
        ('"image";"Katze, Kater\nalle"\na.jpg;1\n', ["Katze, Kater\nalle"]),
        ("image|cat;x|dog;y\na.jpg|1|0\n", ["cat;x", "dog;y"]),
        ("image\tcat, small\tdog, small\na.jpg\t1\t0\n", ["cat, small", "dog, small"]),
        ("sep=;\r\nimage;cat,a;dog,b\r\na.jpg;1;0\r\n", ["cat,a", "dog,b"]),
        ('"SEP=:"\nimage:cat\na.jpg:1\n', ["cat"]),
        ("\n".join(["image,cat;a|b", "", "a.jpg,1", ""]), None),
        # Numbers with a comma make as many cells again, but none of the header.
        ("image;cat;dog\na.jpg;1,0;0,0\nb.jpg;;1,0\n", ["cat", "dog"]),
    ],
)
def test_the_separator_is_what_makes_rows_of_equal_length(tmp_path, content, names):
    path = write(tmp_path / "t.csv", content)
    if names is None:
        with pytest.raises(InputError, match=r"'cat;a\|b'\), separated by commas, but row 2 has 0"):
            table.read_own_table(path, may_miss=True)
        return
    found = table.read_own_table(path, may_miss=True)
    assert found.class_names == tuple(names)
    assert found.splits["train"].labels[0].tolist() == [1, 0][: len(names)]


def test_a_row_of_another_length_is_named_by_the_separator_of_all_others(tmp_path):
    rows = "".join(f"{n}.jpg;1,0;0,0\n" for n in range(5))
    path = write(tmp_path / "t.csv", f"image;cat;dog\n{rows}5.jpg;1\n")
    with pytest.raises(InputError, match=r"3 columns .* by semicolons, but row 7 has 2 cells\. A"):
        table.read_own_table(path, may_miss=True)


def test_a_thousand_is_no_label(tmp_path):
    path = write(tmp_path / "t.csv", 'image,pixels\na.jpg,"1,000"\nb.jpg,0\n')
    with pytest.raises(InputError, match="'1,000'"):
        table.read_own_table(path, may_miss=True)


def test_the_index_of_pandas_is_no_class(tmp_path):
    path = write(tmp_path / "t.csv", ",image,cat\n7,a.jpg,1\n0,b.jpg,0\n")
    found = table.read_own_table(path, may_miss=True)
    assert found.class_names == ("cat",)
    assert found.notes == ["The first column has no name and counts the rows: passed over."]
    for rows in ("7,a.jpg,1\n7,b.jpg,0\n", "1.5,a.jpg,1\n2,b.jpg,0\n", ",a.jpg,1\n2,b.jpg,0\n"):
        write(path, f",image,cat\n{rows}")
        with pytest.raises(InputError, match="column 1 has no name; its columns are '', 'image'"):
            table.read_own_table(path, may_miss=True)
    # Nor among known labels for a set that is prepared, where ids may also be in it.
    labels = np.full((2, 1), -1, np.int8)
    for text, ids in ((",image,cat\n7,a,1\n0,b,0\n", ["b", "a"]), (",cat\n7,1\n0,0\n", ["0", "7"])):
        write(path, text)
        found = read_label_file(path, ids=ids, class_names=["cat"], labels=labels)
        assert found.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("files", "cells", "told"),
    [
        (
            ["in/a.jpg", "in/b.jpg"],
            ["a.jpg", "b.jpg"],
            "'a.jpg' is found as 'in/a.jpg': --images={}/in",
        ),
        (
            ["in/a.jpg", "b.jpg", "c.jpg"],
            ["IN/A.JPG", "x.jpg", "c.jpg"],
            (
                "'IN/A.JPG' is found as 'in/a.jpg': write capitals and small letters as the files "
                "have them"
            ),
        ),
        (
            ["in/a.b.jpg", "in/c.jpg"],
            ["in/a.b", "in/c"],
            "'in/a.b' is found as 'in/a.b.jpg': write the endings of the files, too",
        ),
        (
            ["Ka\u0308se.jpg"],
            ["K\u00e4se.jpg"],
            (
                "'K\u00e4se.jpg' is found as 'Ka\u0308se.jpg': letters such as é are put together "
                "otherwise there (Unicode NFC and NFD)"
            ),
        ),
        (
            ["in/a.jpg", "in/b.jpg"],
            ["C:\\photos\\gone.jpg", "C:\\photos\\b.jpg"],
            "'C:/photos/b.jpg' is found as 'in/b.jpg': write paths below {}",
        ),
        (
            ["in/a.jpg", "on/b.jpg"],
            ["a.jpg", "c.jpg"],
            "'a.jpg' is found as 'in/a.jpg': write paths below {}",
        ),
        (["in/a.jpg"], ["c.jpg"], None),
        (["in/a.jpg", "b.jpg", "c.jpg"], ["a.jpg", "b.jpg", "c.jpg"], None),  # only one is missing
    ],
)
def test_images_that_lie_elsewhere_are_found_by_their_names(tmp_path, files, cells, told):
    for name in files:
        write(tmp_path / name, picture(0))
    rows = "".join(f"{cell},1\n" for cell in cells)
    path = write(tmp_path / "t.csv", f"image,cat\n{rows}")
    with pytest.raises(InputError, match="no such file") as error:
        table.read_own_table(path)
    hints = [line for line in str(error.value).splitlines()[1:] if not line.startswith("  row")]
    assert hints == ([told.format(tmp_path)] if told else [])


def test_a_folder_with_a_spreadsheet_and_what_programs_leave_beside_a_table(tmp_path):
    write(tmp_path / "labels.xlsx", b"PK")
    with pytest.raises(
        InputError, match=r"labels\.xlsx: save it as CSV UTF-8; expected one of \.csv"
    ):
        table.read_own_table(tmp_path)
    write(tmp_path / "labels.ods", b"PK")
    with pytest.raises(InputError, match=r"expected one table .*found labels\.ods, labels\.xlsx"):
        table.read_own_table(tmp_path)
    path = write(tmp_path / "labels.csv", "image,cat\na.jpg,1\n")
    for litter in ("~$labels.csv", "._labels.csv"):
        write(tmp_path / litter, b"\0")
    assert table.find_table(tmp_path) == path


def test_images_that_may_be_left_out_are_no_wrong_cells(tmp_path):
    write(tmp_path / "a.jpg", b"no image")
    path = write(tmp_path / "t.csv", "image,cat\na.jpg,1\nb.jpg,0\n")
    for may_break in (False, True):
        with pytest.raises(InputError, match="cannot be used") as error:
            table.read_own_table(path, may_break=may_break)
        assert ("row 2, column 'image': 'a.jpg'; the file is damaged" in str(error.value)) is (
            not may_break
        )
        assert "row 3, column 'image': 'b.jpg'; no such file" in str(error.value)
    found = table.read_own_table(path, may_miss=True, may_break=True)
    assert found.splits["train"].ids == ["a.jpg", "b.jpg"]


def test_images_left_out_are_neither_held_out_nor_counted(tmp_path):
    """Half of them are gone: a fifth of the others is for testing, not of all."""
    rows = [[f"{n:02d}.jpg", str(n % 2), str(n // 2 % 2)] for n in range(40)]
    source = _folder(tmp_path / "mine", rows, ("image", "cat", "dog"))
    for n in range(20):
        (source / rows[n][0]).unlink()
    flags = ("--dataset=table", f"--source={source}", "--leave_out=missing")
    status, shown, errors = prepare(*flags, f"--out={tmp_path / 'out'}")
    assert (status, errors) == (0, "")
    assert "No split for testing: 4 images held out, by label, seed 0." in shown
    dataset = _load(tmp_path / "out", validation_fraction=0.0)
    assert (len(dataset.train.ids), len(dataset.test.ids)) == (16, 4)
    assert dataset.test.labels.sum(axis=0).tolist() == [2, 2]
    assert "Labels of each class, positive / negative, of images that can be read:" in shown
    (line,) = [line for line in shown.splitlines() if "cat" in line]
    assert re.findall(r"\d+ / \d+", line) == ["8 / 8", "2 / 2"]
    status, _, errors = prepare(*flags, "--check-only", "--test_fraction=0.01")
    assert status == 2
    assert "20 images are too few to hold out 1% for testing" in errors


def test_folders_whose_names_are_no_utf8(tmp_path):
    """Read and reported on; not written to, and not in a command that nobody could paste."""
    source = tmp_path / os.fsdecode(b"bilder\xe9")
    _folder(source, _rows(20))
    out = tmp_path / "out"
    status, shown, errors = prepare("--dataset=table", f"--source={source}", f"--out={out}")
    assert (status, errors) == (0, "")
    assert f"table from {tmp_path}/bilder\N{REPLACEMENT CHARACTER}" in shown
    assert (out / "table" / "report.txt").read_text(encoding="utf-8") in shown
    status, _, errors = prepare("--dataset=table", f"--source={source}", f"--out={source}")
    assert status == 2
    assert "is not UTF-8: name another directory" in errors
    path = write(tmp_path / "t.csv", "image,cat\nphotos/000.jpg,1\n")
    with pytest.raises(InputError, match="is found as") as error:
        table.read_own_table(path)
    assert "--images" not in str(error.value)


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
    home = tmp_path / "table"
    reports = [(home / name).read_bytes() for name in ("report.json", "report.txt")]
    write(source / "labels.csv", "image,cat,dog,tree\na.jpg,1,0,\nb.jpg,1,1,1\n")
    status, _, errors = prepare(*flags)
    assert status == 2
    assert "holds other images or labels: delete it" in errors
    # What stays keeps the report on it.
    assert [(home / name).read_bytes() for name in ("report.json", "report.txt")] == reports
    assert stored.open_prepared(sources.find_prepared("table", tmp_path)).class_names == CLASSES


def test_class_names_need_lists(tmp_path):
    with pytest.raises(ValueError, match="--labels_column"):
        table.read_own_table(tmp_path, class_names=tmp_path / "names.txt")
