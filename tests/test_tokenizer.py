import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fvdm_jax.models.tokenizer import (
    END,
    LARGEST,
    OFFSET,
    PAD,
    VOCABULARY,
    byte_tokenizer,
    clean,
    load_tokenizer,
)
from fvdm_jax.program import Refusal

CASES = json.loads((Path(__file__).parent / "golden" / "prompt_clean.json").read_text("utf-8"))

SENTENCES = """\
a red circle moves up over a plain grey background
a blue square moves left while a green triangle stands still
the cat sits on the mat, and the dog sleeps beside the fire
two people walk along the beach at sunset; waves roll in
a close-up of a flower that opens in the morning light
the camera moves slowly forward through a dense forest
rain falls on the "quiet" city - 4 cars, 2 buses & 1 train (at night)
el gato duerme en la cama, le chat dort sur le lit près de la fenêtre
кошка сидит на окне и смотрит на улицу
一只猫坐在红色的沙发上,看着窗外的雨
色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止
两个人在海滩上散步,夕阳西下,最差质量,低质量""".splitlines()

PROMPTS = [
    *SENTENCES,
    *(case["raw"] for case in CASES),
    "",
    " ",
    "The CAT & the Dog… over-exposed, 1,000 times!",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量",
    "a cat 🐱 and a dog 🐶🐶, a family 👨‍👩‍👧 on a 🏖️",
    "un café à Zürich, naïve façade, ½ of № ② ﬁne",
    "アニメの猫 고양이 قطة बिल्ली 犭猶",
    "a​b­c d　e\u0301 \ufeffx",
    "undecodable \udce9 half \ud83d pair \ud83d\ude00 nothing \x00 \x1b[31m",
    "<b>bold</b> <extra> {curly} [square] \\ / ~ ` ^ | @ # $ %",
    "x" * 200,
    "a cat " * 200,
]


def trained(**flags) -> bytes:
    """A small unigram model, as umT5's with pieces for bytes, which are used where nothing else fits."""
    from sentencepiece import SentencePieceTrainer

    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "byte_fallback": True, "vocab_size": 460}
    stop = {"hard_vocab_limit": False, "character_coverage": 0.98, "num_threads": 1, "minloglevel": 2}
    writer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3), model_writer=writer, **(ids | stop | flags)
    )
    return writer.getvalue()


def converted(model: bytes, template: str = "$A </s>", pad: str = "<pad>"):
    """A model of SentencePiece as transformers writes it for its fast tokenizers."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
    from tokenizers import normalizers as normal
    from tokenizers import pre_tokenizers as pre
    from tokenizers.processors import TemplateProcessing

    proto = ModelProto.FromString(model)
    pieces = [(piece.piece.replace("<pad>", pad), piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    charsmap = proto.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normal.Sequence(
        [normal.Precompiled(charsmap), normal.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    special = [AddedToken(name, special=True, normalized=False) for name in (pad, "</s>", "<unk>")]
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with spiece.model and tokenizer.json of the same small model."""
    folder, model = tmp_path_factory.mktemp("umt5"), trained()
    (folder / "spiece.model").write_bytes(model)
    converted(model).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=["bytes", "spiece.model", "tokenizer.json"])
def tokenizer(request, files):
    return byte_tokenizer if request.param == "bytes" else load_tokenizer(files / request.param)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_prompts_are_cleaned_as_published(case):
    assert clean(case["raw"]) == case["official"] == case["diffusers"]


def test_what_is_no_character_can_still_be_written():
    assert clean("a\x00b \ud83d\ude00 \udce9 &#xD800;") == "ab 😀 \ufffd \ufffd"


def test_captions_of_ascii_are_left_as_they_are():
    caption = "a large red circle moves up, then left; 2 squares (plain) don't"
    assert clean(caption) == caption


def test_bytes_an_end_and_padding():
    tokens, mask = byte_tokenizer(["ab", "", "é"], 5)
    a, b = ord("a") + OFFSET, ord("b") + OFFSET
    assert tokens.tolist()[:2] == [[a, b, END, PAD, PAD], [END, PAD, PAD, PAD, PAD]]
    assert tokens[2].tolist() == [0xC3 + OFFSET, 0xA9 + OFFSET, END, PAD, PAD]
    assert mask.sum(1).tolist() == [3, 1, 3]
    assert byte_tokenizer.count("ＡＢ") == 3 and byte_tokenizer.vocabulary == VOCABULARY


def test_every_prompt_ends_is_padded_and_counted(tokenizer):
    tokens, mask = tokenizer(PROMPTS, 1600)
    assert tokens.dtype == np.int32 and mask.dtype == bool and tokens.shape == (len(PROMPTS), 1600)
    counts = [tokenizer.count(prompt) for prompt in PROMPTS]
    assert np.array_equal(mask, np.arange(1600) < np.array(counts)[:, None])
    assert np.all(tokens[~mask] == PAD) and np.all((tokens == END).sum(1) == 1)
    assert tokens[mask].max() < tokenizer.vocabulary and tokens.min() >= 0


def test_a_long_prompt_is_cut_and_still_ends(tokenizer):
    prompt = "the cat sits on the mat, and the dog sleeps"
    whole, cut = (tokenizer([prompt], length)[0][0] for length in (64, 6))
    assert cut.tolist() == [*whole[:5], END] and tokenizer.count(prompt) > 6
    exact = tokenizer.count(prompt)
    assert tokenizer([prompt], exact)[0][0].tolist() == whole[:exact].tolist()
    assert tokenizer([prompt], 1)[0].tolist() == [[END]]


def test_both_files_give_the_same_tokens(files):
    pieces, words = (load_tokenizer(files / name) for name in ("spiece.model", "tokenizer.json"))
    for prompt in PROMPTS:
        assert pieces.encode(clean(prompt)) == words.encode(clean(prompt)), prompt
    assert pieces.vocabulary == words.vocabulary


def test_what_the_model_does_not_know_is_one_unknown_token_not_its_bytes(files):
    pieces = load_tokenizer(files / "spiece.model")
    known = pieces.encode("a cat")
    assert pieces.encode("a cat 🐱🐶 a cat") == [*known, pieces.encode("🐱")[0], 2, *known]


def test_how_a_file_was_last_used_is_forgotten(files, tmp_path):
    used = converted((files / "spiece.model").read_bytes())
    used.enable_truncation(4)
    used.enable_padding(length=9)
    used.save(str(tmp_path / "used.json"))
    fresh, used = load_tokenizer(files / "tokenizer.json"), load_tokenizer(tmp_path / "used.json")
    assert used.count(SENTENCES[0]) == fresh.count(SENTENCES[0]) > 9
    assert used.count("") == 1


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_cut_short_is_refused(files, tmp_path, name, share):
    data = (files / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(Refusal, match="is damaged; give spiece.model"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    "data", [b"\x00" * 50, b"\n\x03abc", b"PK\x03\x04", b"{", b'{"a": 1}', b" {}", b"[]"]
)
def test_what_is_no_tokenizer_is_refused(tmp_path, data):
    (tmp_path / "other").write_bytes(data)
    with pytest.raises(Refusal, match="other: is not a (SentencePiece model|tokenizer.json), or is damaged"):
        load_tokenizer(tmp_path / "other")


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "weights", "wb") as file:
        file.truncate(LARGEST)
    reasons = {"empty": "0 bytes", "weights": f"{LARGEST} bytes", "pipe": "no ordinary", "": "no ordinary"}
    for name, reason in (reasons | {"missing": "No such file", "a\0b": "null byte"}).items():
        with pytest.raises(Refusal, match=reason) as refused:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_a_damaged_table_of_characters_is_refused(files, tmp_path):
    data = (files / "tokenizer.json").read_bytes()
    place = data.index(b'"precompiled_charsmap"') + 200
    (tmp_path / "tokenizer.json").write_bytes(data[:place] + data[place + 1 :])
    # In a process of its own, since the library also says so itself.
    line = "import sys; from fvdm_jax.models.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1])"
    program = [sys.executable, "-c", line, tmp_path / "tokenizer.json"]
    ran = subprocess.run(program, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert "Refusal: error:" in ran.stderr.splitlines()[-1] and "is damaged" in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "template, pad",
    [("$A", "<pad>"), ("</s> $A </s>", "<pad>"), ("$A </s> </s>", "<pad>"), ("$A </s>", "[PAD]")],
)
def test_a_file_with_other_special_tokens_is_refused(files, tmp_path, template, pad):
    other = converted((files / "spiece.model").read_bytes(), template, pad)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Refusal, match=r"0, 1 and \[1\] are needed"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_model_with_other_special_tokens_is_refused(tmp_path):
    (tmp_path / "llama.model").write_bytes(trained(unk_id=0, bos_id=1, eos_id=2, pad_id=-1))
    with pytest.raises(Refusal, match=r"pads with -1, ends with 2 and adds \[2\]"):
        load_tokenizer(tmp_path / "llama.model")


@pytest.mark.parity
@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.json"])
def test_tokens_are_those_of_transformers(files, tmp_path, name):
    from transformers import T5TokenizerFast  # noqa: TID251

    (tmp_path / name).write_bytes((files / name).read_bytes())
    theirs = T5TokenizerFast.from_pretrained(tmp_path, extra_ids=0)
    ours = load_tokenizer(tmp_path / name)
    for length in (512, 12):
        tokens, mask = ours(PROMPTS, length)
        said = theirs(
            [clean(prompt) for prompt in PROMPTS],
            padding="max_length",
            truncation=True,
            max_length=length,
            add_special_tokens=True,
            return_tensors="np",
        )
        np.testing.assert_array_equal(tokens, said.input_ids)
        np.testing.assert_array_equal(mask, said.attention_mask.astype(bool))
