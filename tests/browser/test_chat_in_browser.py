"""The chat cell as a person meets it: JupyterLab in chromium, and a scripted model.

Screenshots stay in pytest's temporary folder; their paths are printed (`pytest -s`).
"""

import re
import time
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect

pytestmark = pytest.mark.browser

TINY = Path(__file__).resolve().parent.parent.parent / "glm3kit" / "tiny" / "tokenizer.model"
MODEL = f"""
import time
from glm3kit import ChatGLM3Tokenizer, ChatSession, chat_widget

tokenizer = ChatGLM3Tokenizer({str(TINY)!r})
GUIDE = \"\"\"1月份去海南旅游，气候凉爽，风景很美 ☀。以下是一些建议：

1. 三亚：海滩、椰子树和热带雨林。
2. 陵水：参观吊脚楼，体验黎族风情。

祝您旅途愉快！\"\"\"
COUNT = " ".join(map(str, range(1, 1000)))
ANSWERS = {{"数数": COUNT, "介绍一下海南": GUIDE, "假设你是一个导游。": "您好，我是您的导游。"}}

def reply(ids):
    said = session.messages[-2]["content"]  # the message that is being answered
    for id_ in tokenizer.build_single_message("assistant", "", ANSWERS.get(said, said))[1:]:
        time.sleep(0.01)
        if said == "坏":
            raise RuntimeError("the card is gone")
        yield id_

session = ChatSession(tokenizer, reply, seq_length=2048)
"""
ATTACK = "<img src=x onerror=\"window.hacked = 'img'\"><script>window.hacked = 'script'</script>"
ROLES = {"user": "user 用户", "system": "system 系统", "observation": "observation 观察"}


class Chat:
    """What a person sees of the chat cell, and does with it, by the names that a screen reader says."""

    def __init__(self, page: Page):
        self.box = page.locator(".glm3kit-chat")
        self.messages = self.box.locator(".glm3kit-messages").get_by_role("article")
        self.text = self.box.get_by_role("textbox", name="Message to the model")
        self.role = self.box.get_by_role("combobox", name="Role that speaks")
        self.status = self.box.get_by_role("status")
        self.send, self.stop, self.clear = (
            self.box.get_by_role("button", name=name) for name in ("Send", "Stop", "Clear")
        )

    def say(self, text: str, role: str = "user") -> Locator:
        """Send a message; return the bubble of the answer, which may still be growing."""
        answer = self.messages.nth(self.messages.count() + 1)
        self.role.select_option(ROLES[role])
        self.text.fill(text)
        self.send.click()
        return answer

    def wait(self) -> None:
        expect(self.stop).to_be_disabled()
        expect(self.send).to_be_enabled()


@pytest.fixture
def chat(lab, page):
    """The chat cell in a notebook whose cells have all been run."""
    path = lab.folder / "chat.ipynb"
    cells = [nbformat.v4.new_code_cell(code.strip()) for code in (MODEL, "chat_widget(session)")]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # without it JupyterLab asks
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    lab.open(page, path)
    lab.run_all(page)
    chat = Chat(page)
    expect(chat.send).to_be_enabled()
    return chat


def picture(page: Page, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.png"
    page.locator(".glm3kit-chat").screenshot(path=path)
    print(f"screenshot: {path}")


def test_a_conversation_in_jupyterlab(lab, page, chat, tmp_path):
    # nothing said yet
    expect(chat.box.locator(".glm3kit-hint")).to_be_visible()
    picture(page, tmp_path, "1-empty")

    # another role sets the scene, then the user asks; the answer streams in
    expect(chat.say("假设你是一个导游。", role="system")).to_contain_text("您好，我是您的导游。")
    chat.wait()
    expect(chat.messages.first).to_have_class(re.compile("glm3kit-system"))
    answer = chat.say("介绍一下海南")
    expect(answer).to_have_class(re.compile("glm3kit-live"))
    picture(page, tmp_path, "2-streaming")
    expect(answer).to_contain_text("祝您旅途愉快！")
    chat.wait()
    expect(answer).to_contain_text("很美 ☀。以下是一些建议：\n\n1. 三亚", use_inner_text=True)
    assert chat.messages.count() == 4
    expect(chat.status).to_contain_text(re.compile(r"\d+ tokens · \d+\.\d tokens/s · context 上下文 \d+ / 2048"))

    # stop in the middle of a long answer: what was said stays, and nothing more comes
    answer = chat.say("数数")
    expect(answer).to_contain_text(" 20 ")
    picture(page, tmp_path, "3-before-stop")
    chat.stop.click()
    chat.wait()
    expect(chat.status).to_contain_text("stopped")
    said = answer.inner_text()
    time.sleep(0.5)
    assert answer.inner_text() == said and " 999" not in said
    expect(answer).to_be_in_viewport()  # the conversation shows its end

    # markup from user and model is text
    answer = chat.say(ATTACK, role="observation")
    chat.wait()
    expect(answer).to_contain_text(ATTACK)
    expect(chat.messages.nth(6)).to_contain_text(ATTACK)
    assert chat.box.locator(".glm3kit-messages").locator("img, script").count() == 0
    assert page.evaluate("window.hacked") is None

    # an error shows its reason, gives the message back and leaves everything usable
    chat.say("坏")
    expect(chat.box.get_by_role("alert")).to_contain_text("RuntimeError: the card is gone")
    chat.wait()
    expect(chat.text).to_have_value("坏")
    picture(page, tmp_path, "4-error")
    expect(chat.say("好")).to_contain_text("好")
    chat.wait()
    expect(chat.box.get_by_role("alert")).to_have_count(0)

    # dark theme: the colours follow, the conversation stays
    told = chat.messages.all_inner_texts()
    assert len(told) == 10
    light = chat.box.evaluate("box => getComputedStyle(box).backgroundColor")
    lab.theme(page, "JupyterLab Dark")
    page.wait_for_function(
        "light => getComputedStyle(document.querySelector('.glm3kit-chat')).backgroundColor !== light", arg=light
    )
    expect(chat.messages).to_have_text(told, use_inner_text=True)  # JupyterLab may draw outputs anew
    picture(page, tmp_path, "5-dark")
    lab.theme(page, "JupyterLab Light")

    # the page is reloaded: display the session again, and the conversation is there
    lab.open(page, lab.folder / "chat.ipynb")
    lab.run_cell(page, 1)
    expect(chat.messages).to_have_text(told, use_inner_text=True)
    picture(page, tmp_path, "6-reloaded")

    # and it can be cleared
    chat.clear.click()
    expect(chat.messages).to_have_count(0)
    expect(chat.box.locator(".glm3kit-hint")).to_be_visible()
