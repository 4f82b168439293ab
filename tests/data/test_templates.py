"""The shipped chat templates, and the choice of one."""

import pytest

from llmkit.data.templates import read_template, shipped_templates
from llmkit.errors import ConfigError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " 1+1? "},
    {"role": "assistant", "content": " 2 "},
    {"role": "user", "content": "2+2?"},
]
RENDERED = {
    "chat-ml": (
        "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 1+1? <|im_end|>\n"
        "<|im_start|>assistant\n 2 <|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "role-markers": (
        "<|bos|><SYSTEM>Be brief.</SYSTEM><USER> 1+1? </USER><ASSISTANT> 2 </ASSISTANT><USER>2+2?</USER><ASSISTANT>"
    ),
    "plain": "<|bos|>Be brief.\n\n### User:\n1+1?\n\n### Assistant:\n2<|end|>\n\n### User:\n2+2?\n\n### Assistant:\n",
}


@pytest.mark.parametrize("name", shipped_templates())
def test_a_shipped_template_renders_as_it_always_did(tiny_tokenizer, name):
    template = read_template(name)

    text = tiny_tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED[name]


def test_a_file_is_read(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }} é", encoding="utf-8")

    assert read_template(str(tmp_path / "own.jinja")) == "{{ messages }} é"


def test_a_name_of_nothing_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.chat_template=chatml: .* Did you mean 'chat-ml'\? Shipped: .*plain"):
        read_template("chatml")
