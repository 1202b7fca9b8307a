"""A SentencePiece BPE model as a fast tokenizer of the `tokenizers` library: tokenizer.json, tokenizer_config.json.

SentencePiece joins the two neighbours whose joined piece has the best score, the leftmost pair first. The fast BPE goes
by a list of pairs instead: so every way to split a piece into two pieces becomes a pair, in the order of the scores.
Normalization is the model's own table (the Precompiled normalizer), then what SentencePiece does about spaces.

What cannot be said that way is refused by name. Two things remain. SentencePiece lets the leftmost win where two
*different* pairs make one piece. And the Precompiled normalizer takes a letter with its combining marks as one, where
SentencePiece looks for the longest entry of its table: letters written decomposed, as two or three code points, may be
cut differently in Vietnamese, polytonic Greek, Japanese and Korean, and a mark on a symbol such as a circled digit is
lost. (NFC before it would mend these, and break Arabic and Hebrew vowels as they are typed.)
"""

import base64
import json
from collections.abc import Iterable
from pathlib import Path

from tool import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces in sentencepiece_model.proto
BPE = 2  # type of model
SPACE = "\u2581"
# Texts on which a conversion is tried before it is believed: spaces, letters that normalization changes, scripts with
# and without pieces, control letters, digits, markup.
TRIALS = (
    "", " ", "  ", "a", " a", "a ", "  two  spaces ", "tab\tnew\nline\r\n x", "The quick brown fox, 1234567 times.",
    "h\u00e9llo w\u00f6rld \ufb01 \u00bd \u2460 \uff21", "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644",
    "a\u0301 e\u0308", "emoji \U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "3.14 1,000 x=y**2; return {}", "\u00a0nbsp\u2003em", "\u200bzero\ufeffwidth", "\u2581 \u2581x",
    "<s>", "</s> <unk> <pad><mask>", "<0x41>",
    "\x00\x01 control", "\ufdfa \u337f \u2122", "aaaa aaaaaaa bbbbbbbb", "---====____", "soft\u00adhyphen",
    "Don't \u201cquote\u201d me \u2014 it\u2019s <s>struck</s> out", "line one\n\nline two\n", "http://www.a.org/b?c=d&e",
)  # fmt: skip


def read_model(path: Path):
    """The ModelProto of a SentencePiece file. Raises InputError if it is none, or of a kind that a fast BPE is not."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except DecodeError:
        raise InputError(f"{path}: expected a SentencePiece model, found something else; set --tokenizer") from None
    if found := next((what for what, holds in oddities(proto).items() if holds), None):
        expected = "a plain SentencePiece BPE model, which a fast tokenizer can follow"
        raise InputError(f"{path}: expected {expected}, found {found}; train one with data/tokenize_docs.py")
    return proto


def oddities(proto) -> dict[str, bool]:
    """What a fast BPE cannot follow, and whether a ModelProto has it."""
    trainer, normalizer, pieces = proto.trainer_spec, proto.normalizer_spec, proto.pieces
    return {
        "another type of model": trainer.model_type != BPE,
        "user-defined pieces": any(piece.type == USER_DEFINED for piece in pieces),
        "unused pieces": any(piece.type == UNUSED for piece in pieces),
        "spaces as suffixes": trainer.treat_whitespace_as_suffix,
        "spaces that are not escaped": not normalizer.escape_whitespaces,
        "a denormalizer": bool(proto.denormalizer_spec.precompiled_charsmap),
        "a piece twice": len({piece.piece for piece in pieces}) < len(pieces),
    }


def merge_pairs(proto) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, the best score of the joined piece first."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    found = []
    for whole, i in ids.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in ids and right in ids:
                found.append((-proto.pieces[i].score, i, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def normalizers(spec) -> list[dict]:
    """Text to what is cut into pieces: the table, spaces at both ends and doubled ones, the mark for a space."""
    steps = []
    if spec.precompiled_charsmap:
        table = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def decoders(spec) -> list[dict]:
    """Pieces to text. mlx-lm knows this list of steps and streams text by it."""
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    steps.append({"type": "Fuse"})
    if spec.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def starts_with(bos: str, bos_id: int) -> dict:
    """The step that puts BOS before a text, as every document of the training data begins."""
    first, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    known = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": known,
    }


def special_ids(proto) -> dict[str, tuple[str, int]]:
    """{"bos" | "eos" | "unk" | "pad": (piece, id)} of those that the model has."""
    ids, spec = {piece.piece: i for i, piece in enumerate(proto.pieces)}, proto.trainer_spec
    named = {"bos": spec.bos_piece, "eos": spec.eos_piece, "unk": spec.unk_piece, "pad": spec.pad_piece}
    return {
        name: (piece, ids[piece])
        for name, piece in named.items()
        if piece in ids and proto.pieces[ids[piece]].type in (UNKNOWN, CONTROL)
    }


def fast_tokenizer(proto) -> dict:
    """The content of tokenizer.json."""
    special = special_ids(proto)
    added = [
        {"id": i, "content": p.piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, p in enumerate(proto.pieces) if p.type in (UNKNOWN, CONTROL)
    ]  # fmt: skip
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": special["unk"][0] if "unk" in special else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        "ignore_merges": False,
        "vocab": {piece.piece: i for i, piece in enumerate(proto.pieces)},
        "merges": merge_pairs(proto),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": starts_with(*special["bos"]) if "bos" in special else None,
        "decoder": {"type": "Sequence", "decoders": decoders(proto.normalizer_spec)},
        "model": model,
    }


def tokenizer_config(proto, length: int) -> dict:
    """The content of tokenizer_config.json. Our documents have no end sign: the next one's BOS ends them, so BOS is
    named as EOS. `split_special_tokens`: the letters "<s>" in a text are letters, as in SentencePiece."""
    special = special_ids(proto)
    names = {"bos_token": "bos", "eos_token": "bos", "unk_token": "unk", "pad_token": "pad"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: special[name][0] for key, name in names.items() if name in special},
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def differing(path: Path, folder: Path, texts: Iterable[str]) -> list[tuple[str, list[str], list[str]]]:
    """(text, SentencePiece's pieces, the fast tokenizer's) of the texts that the two encode differently."""
    import sentencepiece
    from tokenizers import Tokenizer

    slow = sentencepiece.SentencePieceProcessor(model_file=str(path))
    fast = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    fast.encode_special_tokens = True  # what `split_special_tokens` sets
    found = []
    for text in texts:
        expected, ids = slow.encode(text), fast.encode(text, add_special_tokens=False).ids
        if expected != ids:
            pieces = [slow.id_to_piece(i) for i in expected]
            found.append((text, pieces, [fast.id_to_token(i) for i in ids]))
    return found


def convert(path: Path, folder: Path, length: int) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json of the SentencePiece model `path` into `folder`; returns the ids
    of its special tokens. length: tokens that the model reads. Raises InputError where the two would differ."""
    proto = read_model(path)
    folder = Path(folder)
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer(proto), ensure_ascii=False), encoding="utf-8")
    config = json.dumps(tokenizer_config(proto, length), indent=1, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    if wrong := differing(path, folder, TRIALS):
        text, expected, found = wrong[0]
        where = f"{path}: a fast tokenizer that encodes {text!r}"
        raise InputError(f"{where}: expected {expected[:12]}, found {found[:12]}; train one with data/tokenize_docs.py")
    return {name: i for name, (_, i) in special_ids(proto).items()}
