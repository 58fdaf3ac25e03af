"""The files of the chat cell's page: nothing that would be markup, texts in both languages, what the page asks for."""

import json
import re
import threading

import pytest
from support import ROOT

from glm3kit.chat.session import ChatSession
from glm3kit.notebook.chat_widget import GUIDE, ChatWidget, chat_widget

SOURCE = ChatWidget._esm


def test_the_page_puts_nothing_into_itself_but_text_nodes():
    for door in ("innerHTML", "outerHTML", "insertAdjacentHTML", "DOMParser", "createContextualFragment", "srcdoc",
                 "document.write", "eval(", "new Function", "setTimeout(\"", "import("):
        assert door not in SOURCE
    assert re.findall(r"href[:=] ?\S+", SOURCE) == ["href: url,"], "the file that is saved, nothing that was said"


def test_both_languages_have_every_text_and_the_page_uses_no_other():
    texts = json.loads((ROOT / "glm3kit/notebook/chat_texts.json").read_text(encoding="utf-8"))
    english, chinese = texts["en"], texts["zh"]
    assert english.keys() == chinese.keys()
    placeholders = re.compile(r"\{\w+\}")
    for key, text in english.items():
        assert sorted(placeholders.findall(text)) == sorted(placeholders.findall(chinese[key])), key
    used = set(re.findall(r"\bt\.(\w+)", SOURCE))
    assert used <= english.keys()


def test_every_action_of_the_page_is_one_that_python_knows(tokenizer):
    chat = chat_widget(ChatSession(tokenizer, lambda ids: iter(()), seq_length=512))
    actions = set(re.findall(r'\b(?:this|chat)\.ask\("(\w+)"', SOURCE))
    assert {"send", "set_sampling", "load"} <= actions
    for action in actions:
        try:
            chat.do(action)
        except TypeError:  # it wants arguments
            continue
    for thread in threading.enumerate():
        if thread.name == "glm3kit chat":
            thread.join(20)
    with pytest.raises(KeyError):
        chat.do("fly")


def test_the_guide_is_the_conversation_of_the_document(shared):
    document = (shared / "seed/glm3.md").read_text(encoding="utf-8")
    asked = re.findall(r'^role="(\w+)"\ntext ?= ?"(.*)"$', document, re.MULTILINE)
    assert [(line["role"], line["text"]) for line in GUIDE] == asked
