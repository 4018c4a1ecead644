"""From prompts to ids: what is learned, what is cut, how batches are padded; on tokenizers of three families."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moses.errors import StreamError
from moses.stream.prompt import IGNORED, Collator, Cuts, encode_prompt, encode_train, label_names
from moses.stream.task import Example

CORPUS = ["What is the topic of this text? Options: sports, world. Answer: sports world user assistant " * 3]
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
EXAMPLE = Example("What is the topic?\nAnswer:", "sports")


def byte_level(chat: bool = False) -> PreTrainedTokenizerBase:
    """As GPT-2, Llama 3, Qwen and SmolLM2: a blank belongs to the word after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>")
    fast.chat_template = TEMPLATE if chat else None
    return fast


def metaspace() -> PreTrainedTokenizerBase:
    """As Llama 2: a text begins with a blank of its own, and with <s>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def word_level(single: str = "[CLS] $A [SEP]") -> PreTrainedTokenizerBase:
    """As BERT (or, with another end, T5): special tokens around every text."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("[CLS]", 2), ("[SEP]", 3), ("</s>", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="</s>",
    )


CAUSAL = {"plain": byte_level, "chat": lambda: byte_level(chat=True), "metaspace": metaspace}


@pytest.mark.parametrize("family", CAUSAL)
def test_only_the_answer_and_its_end_are_learned(family: str) -> None:
    tokenizer = CAUSAL[family]()
    encoded = encode_train(tokenizer, EXAMPLE, 200, "causal")
    learned = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(learned[:-1]).strip() == "sports"
    assert learned[-1] == tokenizer.eos_token_id
    assert encoded["labels"] == [IGNORED] * (len(encoded["labels"]) - len(learned)) + learned
    assert encoded["input_ids"][-len(learned) :] == learned
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_goes_on_where_training_showed_the_answer(family: str) -> None:
    tokenizer = CAUSAL[family]()
    encoded = encode_train(tokenizer, EXAMPLE, 200, "causal")
    prompt = encode_prompt(tokenizer, EXAMPLE.prompt, 200, "causal")
    assert prompt["input_ids"] == [
        token for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label == IGNORED
    ]
    assert tokenizer.eos_token_id not in prompt["input_ids"][-1:]


def test_plain_text_keeps_the_blank_before_the_answer() -> None:
    tokenizer = byte_level()
    ids = encode_train(tokenizer, EXAMPLE, 200, "causal")["input_ids"]
    assert ids == tokenizer("What is the topic?\nAnswer: sports")["input_ids"] + [tokenizer.eos_token_id]
    newline = encode_train(tokenizer, Example("Answer:\n", "sports"), 200, "causal")["input_ids"]
    assert tokenizer.decode(newline[:-1]) == "Answer:\nsports"


def test_metaspace_has_no_second_blank() -> None:
    tokenizer = metaspace()
    ids = encode_train(tokenizer, EXAMPLE, 200, "causal")["input_ids"]
    assert ids == tokenizer("What is the topic?\nAnswer: sports")["input_ids"] + [tokenizer.eos_token_id]


def test_chat_template_where_there_is_one() -> None:
    tokenizer = byte_level(chat=True)
    text = tokenizer.decode(encode_train(tokenizer, EXAMPLE, 200, "causal")["input_ids"])
    assert text == "<|start|>user\nWhat is the topic?\nAnswer:<|end|>\n<|start|>assistant\nsports<|end|>"
    plain = tokenizer.decode(encode_train(tokenizer, EXAMPLE, 200, "causal", template="plain")["input_ids"])
    assert plain == "What is the topic?\nAnswer: sports<|end|>"


def test_chat_template_that_is_not_there() -> None:
    with pytest.raises(StreamError, match="no chat template: use template 'plain'"):
        encode_prompt(byte_level(), "p", 50, "causal", template="chat")


@given(words=st.integers(1, 120), max_length=st.integers(30, 80))
def test_a_long_prompt_loses_its_middle_only(words: int, max_length: int) -> None:
    tokenizer = TOKENIZER
    prompt = "What " + "is " * words + "Answer:"
    cuts = Cuts()
    encoded = encode_train(tokenizer, Example(prompt, "sports"), max_length, "causal", cuts=cuts)
    whole = tokenizer(prompt)["input_ids"]
    answer = [label for label in encoded["labels"] if label != IGNORED]
    kept = encoded["input_ids"][: -len(answer)]
    room = max_length - len(answer)
    assert tokenizer.decode(answer[:-1]) == " sports"
    assert cuts.seen == 1
    assert cuts.longest == len(whole)
    if len(whole) <= room:
        assert kept == whole
        assert cuts.cut == 0
    else:
        assert len(encoded["input_ids"]) == max_length
        assert kept[: room // 2] == whole[: room // 2]
        assert kept[room // 2 :] == whole[-(room - room // 2) :]
        assert cuts.cut == 1


TOKENIZER = byte_level()


def test_a_prompt_that_just_fits_is_not_cut() -> None:
    ids = TOKENIZER("is " * 30)["input_ids"]
    cuts = Cuts()
    assert encode_prompt(TOKENIZER, "is " * 30, len(ids), "causal", cuts=cuts)["input_ids"] == ids
    assert cuts.cut == 0
    assert len(encode_prompt(TOKENIZER, "is " * 30, len(ids) - 1, "causal", cuts=cuts)["input_ids"]) == len(ids) - 1
    assert cuts.cut == 1


def test_cuts_are_counted_and_said() -> None:
    cuts = Cuts()
    for words in (1, 100, 200):
        encode_prompt(TOKENIZER, "is " * words, 20, "causal", cuts=cuts)
    longest = len(TOKENIZER("is " * 200)["input_ids"])
    assert str(cuts) == f"2 of 3 prompts were cut in the middle to fit 20 tokens (the longest has {longest})"


def test_an_answer_that_does_not_fit_is_refused() -> None:
    for kind in ("causal", "seq2seq"):
        with pytest.raises(
            StreamError, match=r"the answer to 'topic\?' has \d+ tokens, and max_length is 24: raise"
        ) as caught:
            encode_train(TOKENIZER, Example("topic?", "sports " * 40), 24, kind)
        assert caught.value.code == "answer_too_long"


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(StreamError, match="8 tokens are left for a prompt, 16 are the least"):
        encode_prompt(TOKENIZER, "p", 8, "causal")
    with pytest.raises(StreamError, match="raise max_length"):
        encode_train(TOKENIZER, Example("is " * 100, "sports " * 3), 17, "causal")


def test_seq2seq_reads_the_prompt_and_writes_the_answer() -> None:
    tokenizer = word_level("$A </s>")
    encoded = encode_train(tokenizer, EXAMPLE, 100, "seq2seq")
    assert encoded["input_ids"] == tokenizer(EXAMPLE.prompt)["input_ids"]
    assert encoded["input_ids"][-1] == tokenizer.eos_token_id
    assert encoded["labels"] == [tokenizer.convert_tokens_to_ids("sports"), tokenizer.eos_token_id]


def test_classifier_has_the_answers_number() -> None:
    tokenizer = word_level()
    encoded = encode_train(tokenizer, EXAMPLE, 100, "classifier", labels=["politics", "sports"])
    assert encoded["input_ids"] == tokenizer(EXAMPLE.prompt)["input_ids"]
    assert encoded["labels"] == 1
    assert encode_train(tokenizer, EXAMPLE, 100, "classifier", labels=["world"])["labels"] == IGNORED


def test_a_cut_prompt_of_a_classifier_keeps_its_ends() -> None:
    tokenizer = word_level()
    ids = encode_prompt(tokenizer, "topic " * 100, 20, "classifier")["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (20, tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_label_names_are_sorted_and_stripped() -> None:
    assert label_names([Example("p", " b"), Example("q", "a"), Example("r", "b ")]) == ["a", "b"]


def test_a_task_of_texts_is_no_classification() -> None:
    with pytest.raises(StreamError, match="30 different answers in 30 examples: a task for a model that writes"):
        label_names([Example("p", f"text {number}") for number in range(30)])
    with pytest.raises(StreamError, match="1 different answer"):
        label_names([Example("p", "a")] * 3)
    many = [Example("p", f"{number}") for number in range(1001)] * 5
    with pytest.raises(StreamError, match="1001 different answers"):
        label_names(many)


def test_collator_pads_right_to_train() -> None:
    rows = [
        encode_train(TOKENIZER, Example(prompt, "sports"), 50, "causal") for prompt in ("topic?", "What is the topic?")
    ]
    batch = Collator(TOKENIZER)(rows)
    short, long = len(rows[0]["input_ids"]), len(rows[1]["input_ids"])
    assert short < long
    assert batch["input_ids"].shape == (2, long)
    assert batch["input_ids"].dtype.is_floating_point is False
    assert batch["input_ids"][0].tolist() == rows[0]["input_ids"] + [TOKENIZER.pad_token_id] * (long - short)
    assert batch["attention_mask"][0].tolist() == [1] * short + [0] * (long - short)
    assert batch["labels"][0].tolist() == rows[0]["labels"] + [IGNORED] * (long - short)


def test_collator_pads_left_to_generate() -> None:
    rows = [encode_prompt(TOKENIZER, prompt, 50, "causal") for prompt in ("topic?", "What is the topic?")]
    batch = Collator(TOKENIZER, side="left")(rows)
    gap = len(rows[1]["input_ids"]) - len(rows[0]["input_ids"])
    assert batch["input_ids"][0].tolist() == [TOKENIZER.pad_token_id] * gap + rows[0]["input_ids"]
    assert batch["attention_mask"][0].tolist() == [0] * gap + [1] * len(rows[0]["input_ids"])


def test_collator_stacks_labels_of_classes_and_other_numbers() -> None:
    tokenizer = word_level()
    rows = [encode_train(tokenizer, EXAMPLE, 100, "classifier", labels=["sports"]) | {"task_id": 7} for _ in range(3)]
    batch = Collator(tokenizer)(rows)
    assert batch["labels"].tolist() == [0, 0, 0]
    assert batch["task_id"].tolist() == [7, 7, 7]
