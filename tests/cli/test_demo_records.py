"""The demo's records: those shipped, and reading a user's."""

import json
from pathlib import Path

import pytest

from fused_pref.__main__ import main
from fused_pref.cli.demo.records import SHIPPED, Record, read_records, split_records
from fused_pref.cli.demo.texts import load_tokenizer, make_rows
from fused_pref.cli.usage import UsageError

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}

# The shipped records.


def test_shipped_records_are_many_and_varied() -> None:
    lines = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    records = read_records(SHIPPED)
    assert len(records) == len(lines) >= 150
    assert len({line["pair"] for line in lines}) >= 4
    for split in ("train", "heldout"):
        part = [line for line in lines if line["split"] == split]
        assert {line["pair"] for line in part} == {line["pair"] for line in lines}
        assert {line["flaw"] for line in part} == {line["flaw"] for line in lines}


@pytest.mark.slow
def test_shipped_records_are_clean() -> None:
    records = read_records(SHIPPED)
    assert len({record.prompt for record in records}) == len(records)
    assert len({record.chosen for record in records}) == len(records)
    for record in records:
        for text in (record.chosen, record.rejected):
            assert text == " ".join(text.split()), text
    train_part, heldout = split_records(records, seed=0)
    assert not {record.chosen for record in train_part} & {record.chosen for record in heldout}
    _, cut = make_rows(records, load_tokenizer())
    assert cut == 0


# A user's records.

# line, part of the message
MALFORMED: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"prompt": ', "not valid JSON: Expecting value at column 12"),
    "two objects": (b"{} {}", "not valid JSON: Extra data at column 4"),
    "too deep": (b"[" * 200_000, "not valid JSON: nested too deeply"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
    "a list": (b'["p", "c", "r"]', 'must be a JSON object with prompt, chosen, rejected; got ["p", "c", "r"]'),
    "a string": (b'"p"', 'must be a JSON object with prompt, chosen, rejected; got "p"'),
    "null": (b"null", "must be a JSON object with prompt, chosen, rejected; got null"),
    "no key": (b"{}", "the key 'prompt' is missing; got none"),
    "no chosen": (b'{"prompt": "p", "rejected": "r"}', "the key 'chosen' is missing; got 'prompt', 'rejected'"),
    "no rejected": (b'{"prompt": "p", "chosen": "c"}', "the key 'rejected' is missing; got 'prompt', 'chosen'"),
    "a number": (b'{"prompt": 3, "chosen": "c", "rejected": "r"}', "'prompt' must be a string; got 3"),
    "a null": (b'{"prompt": "p", "chosen": null, "rejected": "r"}', "'chosen' must be a string; got null"),
    "messages": (b'{"prompt": "p", "chosen": "c", "rejected": [{}]}', "'rejected' must be a string; got [{}]"),
    "empty": (b'{"prompt": "p", "chosen": "c", "rejected": ""}', "'rejected' must not be empty"),
    "blank": (b'{"prompt": " ", "chosen": "c", "rejected": "r"}', "'prompt' must not be empty"),
    "half a pair": (b'{"prompt": "p", "chosen": "c\\ud800", "rejected": "r"}', "'chosen' is not valid text at char"),
    "the same": (b'{"prompt": "p", "chosen": "c", "rejected": "c"}', "'chosen' and 'rejected' must differ"),
    "bad split": (json.dumps({**GOOD, "split": "test"}).encode(), "'split' must be one of ('train', 'heldout'); got"),
    "a null split": (json.dumps({**GOOD, "split": None}).encode(), "must be one of ('train', 'heldout'); got null"),
    "splits": (json.dumps({**GOOD, "split": ["train"]}).encode(), "'split' must be one of ('train', 'heldout'); got ["),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8 at byte 1"),
    "zeros": (b"\0" * 64, "not valid JSON: Expecting value at column 1"),
    "many digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "not valid JSON: a number has too many digits"),
    "control character": (b'{"prompt": "\x01"}', "not valid JSON: Invalid control character"),
    "not a number": (b'{"prompt": NaN}', "'prompt' must be a string; got NaN"),
    "a long value": (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "'prompt' must be a string; got [[["),
    "a key of two lines": (b'{"pro\\nmpt": "p"}', r"the key 'prompt' is missing; got 'pro\nmpt'"),
    "no-break space": ('{"prompt": "\u00a0"}'.encode(), "'prompt' must not be empty"),
    "some splits": (json.dumps({**GOOD, "split": "train"}).encode(), "either every record or none must have 'split'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, message = MALFORMED[name]
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n")
    assert main(["demo", "--data", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fused_pref: {path}, line 3: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("number", "message"), [(0, "got 0"), (3, "got 3")])
def test_too_few_records(number: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_bytes((json.dumps(GOOD).encode() + b"\n") * number)
    with pytest.raises(UsageError, match=f"few.jsonl: at least 4 records are needed; {message}"):
        read_records(path)


@pytest.mark.parametrize(("name", "reason"), [("nowhere.jsonl", "No such file"), (".", "Is a directory")])
def test_unreadable_file(name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--data", str(tmp_path / name)]) == 2
    assert f"cannot read {tmp_path / name}: {reason}" in capsys.readouterr().err


def test_records_may_have_other_keys_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = json.dumps({**GOOD, "chosen": "Grüße\u2028", "score": 3}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n \n" + b"\n".join([line] * 3))
    assert read_records(path) == [Record("p", "Grüße\u2028", "r", None)] * 4


def test_a_split_is_made_by_the_seed_where_there_is_none() -> None:
    records = [Record(str(i), "c", "r", None) for i in range(10)]
    train_part, heldout = split_records(records, seed=3)
    assert (len(train_part), len(heldout)) == (8, 2)
    assert sorted(train_part + heldout, key=lambda record: record.prompt) == records
    assert split_records(records, seed=3) == (train_part, heldout)
    assert len({split_records(records, seed)[1][0].prompt for seed in range(20)}) > 3


def test_a_split_that_is_given_is_kept() -> None:
    records = [Record(str(i), "c", "r", "heldout" if i % 3 else "train") for i in range(6)]
    train_part, heldout = split_records(records, seed=0)
    assert [record.prompt for record in train_part] == ["0", "3"]
    assert [record.prompt for record in heldout] == ["1", "2", "4", "5"]
    with pytest.raises(UsageError, match="both splits need records; got 2 for train and 0 for heldout"):
        split_records(train_part, seed=0)
