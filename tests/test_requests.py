"""From a request to token ids: what stands between prompt and answer, and that what is trained is what is generated."""

from __future__ import annotations

import json
import logging
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REQUEST, load
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdpo_editor import RequestError, edit
from kdpo_editor.engine.generation import says_target
from kdpo_editor.requests import forms
from kdpo_editor.requests.chat import as_chat
from kdpo_editor.requests.joint import joint
from kdpo_editor.requests.tokens import EditTokens, token_ids, tokenize

SMOL = Path(__file__).parent / "data" / "smollm2-tokenizer"
TEXT = [
    "The capital of France is Paris, and that of Italy (a country in the south) is Rome.",
    'He said "Paris" to Ann; she wrote: the list has a name, a place and a thing in it.',
    "first\nsecond\nthird 0 1 2 3 4 5 6 7 8 9 [x] {y}",
]
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GLM_4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
FAMILY = "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"


# Tokenizers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of SmolLM2, unpacked."""
    folder = tmp_path_factory.mktemp("smollm2")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMOL / name, folder)
    (folder / "tokenizer.json").write_bytes(lzma.decompress((SMOL / "tokenizer.json.xz").read_bytes()))
    return folder


@pytest.fixture(scope="module")
def smol(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def beginning(tok: Any) -> Any:
    """``tok``, putting its begin token before every text, as Llama's does."""
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tok.bos_token} $A", special_tokens=[(tok.bos_token, tok.bos_token_id)]
    )
    return tok


def sentencepiece(scheme: str = "first", replaced: bool = False) -> Any:
    """A tokenizer as Llama-2's: words begin with a visible space, also the first; unknown characters are bytes.

    ``replaced``: spaces are put in by a normaliser, as in files converted from older ones.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if replaced:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=180, special_tokens=["<unk>", "<s>", "</s>"]))
    written = json.loads(backend.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    backend = Tokenizer.from_str(json.dumps(written))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> Any:
    """A tokenizer as T5's and Gemma's first: pieces by likelihood, and no bytes for what is unknown."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def small(unknown: str | None) -> Any:
    """A tokenizer that knows the letters of ``TEXT`` alone; others become ``unknown``, or nothing."""
    backend = Tokenizer(models.BPE(unk_token=unknown))
    backend.decoder = decoders.Fuse()
    special = ["<s>", "</s>", *([unknown] if unknown else [])]
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=150, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, bos_token="<s>", eos_token="</s>")


def spaced(tok: Any) -> Any:
    """``tok`` of bytes, with a space put before every text, as RoBERTa's and some GPT-2s'."""
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tok


MADE: dict[str, Callable[[Path], Any]] = {
    "smollm2": PreTrainedTokenizerFast.from_pretrained,
    "smollm2, bos": lambda folder: beginning(PreTrainedTokenizerFast.from_pretrained(folder)),
    "gpt2-mini": lambda _: load("gpt2")[1],
    "gpt2-mini, bos": lambda _: beginning(load("gpt2")[1]),
    "gpt2-mini, space": lambda _: spaced(load("gpt2")[1]),
    "llama-mini": lambda _: load("llama")[1],
    "sentencepiece": lambda _: sentencepiece(),
    "sentencepiece, always": lambda _: sentencepiece("always"),
    "sentencepiece, replaced": lambda _: sentencepiece(replaced=True),
    "sentencepiece, bos": lambda _: beginning(sentencepiece()),
}


@pytest.fixture(scope="module", params=MADE)
def tok(request: pytest.FixtureRequest, folder: Path) -> Any:
    """Each of the tokenizers that can write any text."""
    return MADE[request.param](folder)


def tokens(tok: Any, prompt: str, target: str, **others: Any) -> EditTokens:
    subject = "subject" in others
    ((edit,),) = tokenize(tok, [{"prompt": prompt, "target_new": target, **others}], with_subject=subject)
    return edit


def said(tok: Any, ids: Any) -> str:
    return str(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# What stands between --------------------------------------------------------------------------------------------

JOINTS = [
    ("The capital of France is", "Paris", " "),
    ("The capital of France is ", "Paris", ""),
    ("The capital of France is  ", "Paris", ""),
    ("The capital of France is\N{NO-BREAK SPACE}", "Paris", ""),
    ("The capital of France is", " Paris", " "),
    ("The capital of France is", "\tParis", ""),
    ("The capital of France is ", " Paris", ""),
    ("Q: the capital of France?\nA:", "Paris", " "),
    ("Q: the capital of France?\nA: ", "Paris", ""),
    ("Q: the capital of France?\n", "Paris", ""),
    ("Q: the capital of France?\n\n", "Paris", ""),
    ("Write a list:", "\n- one\n- two\n\n- three", ""),
    ("Write a list:\n", "\n- one\n- two", ""),
    ("Write a list:", "one\ntwo\n\nthree", " "),
    ("The capital (", "Paris", ""),
    ("The capital [", "Paris", ""),
    ("The capital (of France)", "Paris", " "),
    ('He said "', "Paris", ""),
    ('He said:"', "Paris", ""),
    ('He said "Paris"', "again", " "),
    ("He said '", "Paris", ""),
    ("It is Ann's", "place", " "),
    ("The towns'", "names", " "),
    ("He said ('", "Paris", ""),
    ("The command `", "ls", ""),
    ("He said “", "Paris", ""),
    ("He said “Paris”", "again", " "),
    ("Er sagte „", "Paris", ""),
    ("Er sagte „Paris“", "noch einmal", " "),
    ("Il a dit « ", "Paris", ""),
    ("Er sagte »", "Paris", ""),
    ("Er sagte »Paris«", "noch einmal", " "),
    ("法国的首都是", "巴黎", ""),
    ("法国的首都是\N{FULLWIDTH COLON}", "巴黎", ""),
    ("法国的首都是", "Paris", " "),
    ("The capital is", "巴黎", " "),
    ("他出生于", "1990年", ""),
    ("他出生于", "1990", ""),
    ("1 + 1 =", "2", " "),
    ("日本の首都は?", "東京", ""),
    ("日本の首都は「", "東京", ""),
    ("日本の首都は", FAMILY, ""),
    ("เมืองหลวงของไทยคือ", "กรุงเทพ", ""),
    ("한국의 수도는", "서울", " "),
    ("בירת צרפת היא", "פריז", " "),
    ("Das Symbol ist", f"{FAMILY} und 🎉", " "),
]


@pytest.mark.parametrize(("prompt", "target", "between"), JOINTS)
def test_what_stands_between_prompt_and_answer(smol: Any, prompt: str, target: str, between: str) -> None:
    assert joint(smol, prompt, target) == between


@pytest.mark.parametrize(("prompt", "target", "between"), JOINTS)
def test_the_prompts_ids_are_its_own_and_the_answers_say_the_rest(
    tok: Any, prompt: str, target: str, between: str
) -> None:
    """As a user generates: the ids of the prompt are fed, those of the answer come out, and both are read as one."""
    edit = tokens(tok, prompt, target)
    assert edit.prompt.tolist() == tok(prompt)["input_ids"]
    assert said(tok, [*edit.prompt_ids, *edit.chosen.tolist()]).lstrip(" ") == prompt + between + target


@pytest.mark.parametrize(("prompt", "target", "between"), JOINTS)
def test_one_tokenisation_of_the_joined_text_wherever_it_begins_with_the_prompts(
    tok: Any, prompt: str, target: str, between: str
) -> None:
    own, joined = tok(prompt)["input_ids"], tok(prompt + between + target)["input_ids"]
    edit = tokens(tok, prompt, target)
    assert ([*edit.prompt_ids, *edit.chosen.tolist()] == joined) == (joined[: len(own)] == own)


def test_a_space_at_the_prompts_end_leaves_the_answer_without_one(smol: Any) -> None:
    edit = tokens(smol, "The capital is ", "Paris")
    assert smol.convert_ids_to_tokens(edit.prompt.tolist())[-2:] == ["Ġis", "Ġ"]
    assert smol.convert_ids_to_tokens(edit.chosen.tolist()) == ["Paris"]
    assert smol.convert_ids_to_tokens(tokens(smol, "The capital is", "Paris").chosen.tolist()) == ["ĠParis"]


@pytest.mark.parametrize("prompt", ["What species? ", "What species?\n", "The species:", "The species (", 'He is a "'])
@pytest.mark.parametrize("bos", [False, True])
def test_a_model_that_was_edited_generates_the_tokens_that_were_trained(
    llama: Any, settings: Any, prompt: str, bos: bool
) -> None:
    model, tok = llama
    tok = beginning(tok) if bos else tok
    request = {"prompt": prompt, "target_new": "male Noctuidae"}
    edit(model, tok, [request], settings())
    asked = torch.tensor([tok(prompt)["input_ids"]])
    chosen = tokens(tok, prompt, request["target_new"]).chosen
    out = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=len(chosen),
        do_sample=False,
        pad_token_id=tok.pad_token_id,
    )
    assert out[0, asked.shape[1] :].tolist() == chosen.tolist()
    assert says_target(model, tok, [request]) == [True]


@pytest.mark.parametrize(("prompt", "target"), [("What is pi?", "male"), ("What ", "male"), ("(", "male")])
@pytest.mark.parametrize("separator", ["", " ", "\n", " = "])
def test_a_request_may_say_what_stands_between(tok: Any, prompt: str, target: str, separator: str) -> None:
    edit = tokens(tok, prompt, target, separator=separator)
    assert edit.prompt.tolist() == tok(prompt)["input_ids"]
    assert said(tok, [*edit.prompt_ids, *edit.chosen.tolist()]).lstrip(" ") == prompt + separator + target


def test_a_separator_holds_for_rephrases_too_and_none_is_as_if_absent(smol: Any) -> None:
    request = {"prompt": "a:", "target_new": "b", "rephrases": ["c:"]}
    ((first, second),) = tokenize(smol, [{**request, "separator": "\n"}])
    assert [smol.decode(one.chosen) for one in (first, second)] == ["\nb", "\nb"]
    assert second.request == first.prompt_ids
    ((first, second),) = tokenize(smol, [{**request, "separator": None}])
    assert [smol.decode(one.chosen) for one in (first, second)] == [" b", " b"]
    with pytest.raises(RequestError, match="request 0: 'separator' is a int; it must be text"):
        tokenize(smol, [{**request, "separator": 1}])


# Chat templates, begin and end tokens ---------------------------------------------------------------------------


def test_nothing_stands_after_a_chat_templates_end_or_a_special_token(smol: Any) -> None:
    assert joint(smol, as_chat(smol, "What is the capital?"), "Paris") == ""
    assert joint(smol, "The capital<|im_end|>", "Paris") == ""


@pytest.mark.parametrize(
    ("template", "end", "between"),
    [(LLAMA_2, " [/INST]", " "), (GLM_4, "<|assistant|>", "\n"), ("{{ raise_exception('no') }}", " [/INST]", " ")],
)
def test_white_space_that_the_template_puts_before_answers_is_taken(
    smol: Any, template: str, end: str, between: str
) -> None:
    smol = PreTrainedTokenizerFast(tokenizer_object=smol.backend_tokenizer, bos_token="<|im_start|>", eos_token="<s>")
    smol.chat_template = template
    assert joint(smol, f"What is the capital?{end}", "Paris") == between
    smol.chat_template = None
    assert joint(smol, f"What is the capital?{end}", "Paris") == " "


def test_a_prompt_in_the_chat_template_is_fed_as_the_template_feeds_it(folder: Path) -> None:
    """Which has a begin token in its text: the tokenizer puts no second one before it."""
    for tok in (MADE["smollm2"](folder), MADE["smollm2, bos"](folder)):
        asked = [{"role": "user", "content": "What is the capital?"}]
        fed = tok.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
        edit = tokens(tok, as_chat(tok, "What is the capital?"), "Paris")
        assert edit.prompt.tolist() == fed
        assert tok.convert_ids_to_tokens(edit.chosen.tolist()) == ["Paris"]


def test_a_begin_token_is_put_once(tok: Any) -> None:
    ids = tok("Paris is")["input_ids"]
    adds = ids[0] == tok.bos_token_id
    assert token_ids(tok, "Paris is") == ids
    spelled = token_ids(tok, f"{tok.bos_token}Paris is")
    assert spelled.count(tok.bos_token_id) == 1
    assert (spelled == tok(f"{tok.bos_token}Paris is")["input_ids"]) != adds


def test_an_end_token_is_kept_where_the_text_has_one(smol: Any) -> None:
    end = smol.eos_token_id
    assert tokens(smol, "Paris<|im_end|>", "x").prompt.tolist() == smol("Paris<|im_end|>")["input_ids"]
    ((edit,),) = tokenize(smol, [{"prompt": "Paris", "target_new": "x<|im_end|>"}], append_eos=True)
    assert edit.chosen.tolist() == [*smol(" x")["input_ids"], end]


def test_a_tokenizer_without_a_template_is_named(gpt2: Any) -> None:
    with pytest.raises(RequestError, match="gpt2-mini has no chat template to put"):
        as_chat(gpt2[1], "What?")


def test_a_template_that_fails_says_so(gpt2: Any) -> None:
    _, tok = gpt2
    tok.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(RequestError, match="the chat template fails: system first"):
        as_chat(tok, "What?")


# What cannot be written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unknown", ["<unk>", None])
@pytest.mark.parametrize(
    ("target", "lost"), [("Paris 🎉", "'🎉'"), ("Zürich ★🎉", "'Z' '\N{LATIN SMALL LETTER U WITH DIAERESIS}' '★' '🎉'")]
)
def test_a_target_of_unknown_characters_is_refused(unknown: str | None, target: str, lost: str) -> None:
    tok = small(unknown)
    good = {"prompt": "The capital is", "target_new": "Paris"}
    assert len(tokenize(tok, [good, good])) == 2
    with pytest.raises(RequestError) as caught:
        tokenize(tok, [good, {**good, "target_new": target}])
    assert str(caught.value).startswith(f"request 1: the tokenizer cannot write {lost} of the target {target!r}")


def test_unigrams_without_bytes_refuse_them_too() -> None:
    tok = unigram()
    edit = tokens(tok, "The capital is", "Paris")
    assert said(tok, [*edit.prompt_ids, *edit.chosen.tolist()]) == "The capital is Paris"
    with pytest.raises(RequestError, match="cannot write '🎉' of the target '🎉'"):
        tokens(tok, "The capital is", "🎉")


def test_bytes_that_a_real_vocabulary_lacks_are_named(smol: Any) -> None:
    with pytest.raises(RequestError, match=r"request 0: the tokenizer cannot write '\\x16' of the target 'a\\x16b'"):
        tokens(smol, "The capital is", "a\x16b")


def test_unknown_characters_of_a_prompt_are_no_error() -> None:
    tok = small("<unk>")
    edit = tokens(tok, "The ★ capital is", "Paris")
    assert said(tok, edit.chosen) == " Paris"


def test_case_and_unicode_forms_that_a_tokenizer_changes_are_no_error() -> None:
    tok = sentencepiece()
    tok.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    assert (
        said(
            tok,
            tokens(
                tok, "The capital is", "\N{FULLWIDTH LATIN CAPITAL LETTER P}aris \N{LATIN SMALL LIGATURE FI}rst"
            ).chosen,
        )
        == "paris first"
    )


# The subject ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("Paris is in", "Paris"),
        ("The capital Paris's name is", "Paris"),
        ("The capital, Paris, is in", "Paris"),
        ("The capital (Paris) is in", "Paris"),
        ("The name of Paris", "Paris"),
        ("The name of  Paris  is", " Paris "),
        ("The capital\nParis\n", "Paris"),
        ("Who is Jean-Luc O'Neill?", "Jean-Luc O'Neill"),
        ("Wo liegt Köln?", "Köln"),
        ("東京の首都は", "東京"),
        ("日本の東京の名は", "東京"),
        ("ที่กรุงเทพคือ", "กรุงเทพ"),
        ("What does 🎉🎊! mean", "🎊"),
        (f"What is {FAMILY}?", FAMILY),
        ("בירת צרפת היא", "צרפת"),
    ],
)
def test_the_subject_is_from_its_first_token_to_its_last(tok: Any, prompt: str, subject: str) -> None:
    """Its tokens say all of it, and without the first or the last of them they do not."""
    edit = tokens(tok, prompt, "x", subject=subject)
    begin, end = edit.subject
    ids, subject = edit.prompt.tolist(), subject.strip()
    rest = begin + 1
    while not said(tok, ids[begin:rest]).strip():  # a space of its own
        rest += 1
    before = prompt[: prompt.rfind(subject)].strip()
    assert said(tok, ids[:begin]).strip() == before
    assert subject in said(tok, ids[begin:end])
    assert subject not in said(tok, ids[rest:end])
    assert subject not in said(tok, ids[begin : end - 1])


def test_a_token_that_merged_with_the_subjects_end_is_its_last(smol: Any) -> None:
    """``Ġcap`` goes on as ``ital``: where words merge, the token that holds its last character counts."""
    edit = tokens(smol, "The capitals are", "x", subject="capita")
    assert smol.convert_ids_to_tokens(edit.prompt.tolist())[slice(*edit.subject)] == ["Ġcapitals"]


def test_a_templates_end_is_no_subject(smol: Any) -> None:
    edit = tokens(smol, as_chat(smol, "What does an assistant do?"), "x", subject="assistant")
    end = edit.subject[1]
    assert said(smol, edit.prompt[end:]).startswith(" do?")


def test_a_target_that_brings_a_second_space_is_warned_of_once(smol: Any, caplog: Any) -> None:
    forms._SAID.clear()
    request = {"prompt": "The capital is", "target_new": " Paris"}
    with caplog.at_level(logging.WARNING):
        for separator in ("", None, None):
            tokenize(smol, [{**request, "separator": separator}])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "request 0: the target ' Paris' begins with a space and gets another before it; strip it"


def test_a_subject_that_stands_twice_is_warned_of_once(smol: Any, caplog: Any) -> None:
    forms._SAID.clear()
    request = {"prompt": "Paris is the capital; Paris is in", "target_new": "Italy", "subject": "Paris"}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tokenize(smol, [{**request, "prompt": "Paris is in"}, request], with_subject=True)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("request 1: the subject 'Paris' stands more than once in 'Paris is the capital; Paris")
    edit = tokens(smol, request["prompt"], "Italy", subject="Paris")
    assert said(smol, edit.prompt[edit.subject[1] :]) == " is in"


def test_a_chat_templates_line_break_is_no_part_of_a_subject_that_comes_first(smol: Any) -> None:
    edit = tokens(smol, as_chat(smol, "Paris is in"), "x", subject="Paris")
    assert said(smol, edit.prompt[slice(*edit.subject)]) == "Paris"


# As before ------------------------------------------------------------------------------------------------------


def test_the_papers_way_is_as_it_was(gpt2: Any, llama: Any) -> None:
    """One tokenisation of the text joined by a space; the answer is what lies past the prompt's own length."""
    for _, tok in (gpt2, llama):
        joined = tok(f"{REQUEST['prompt']} {REQUEST['target_new']}")["input_ids"]
        own = len(tok(REQUEST["prompt"])["input_ids"])
        edit = tokens(tok, REQUEST["prompt"], REQUEST["target_new"])
        assert (edit.prompt.tolist(), edit.chosen.tolist()) == (joined[:own], joined[own:])
