"""The chat cell as a person meets it: notebook 07 in JupyterLab in chromium, on a tiny model and on a scripted one.

Screenshots stay in output/browser.
"""

import json
import re
import time

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect
from support import ROOT

from glm3kit.chat.transcript import read_transcript
from glm3kit.config.load import load_config
from glm3kit.notebook.chat_widget import GUIDE
from glm3kit.weights.convert import convert_weights
from glm3kit.weights.random import write_random_hub_weights

pytestmark = pytest.mark.browser

NOTEBOOK = ROOT / "notebooks" / "07_multi_role_chat.ipynb"
SMALL = """
model: {num_layers: 1, padded_vocab_size: 2048, hidden_size: 64, ffn_hidden_size: 96, kv_channels: 16,
        num_attention_heads: 4, multi_query_group_num: 2, param_dtype: float32, compute_dtype: float32,
        tokenizer_path: TOKENIZER}
data: {max_source_length: 64, max_target_length: 127}
parallel: {device_target: CPU}
generate: {max_new_tokens: 24}
"""
# Cells at the end of the notebook: a model that says what a test can expect, its chat cell, one in a full window
SCRIPT = """
import time
from glm3kit.chat.tools import calculate

COUNT = " ".join(map(str, range(1, 2000)))
ANSWERS = {
    "假设你现在是一个导游，请尽可能贴近这个角色回答问题。": "您好，我是您的导游。请问有什么可以帮您？",
    "我打算1月份去海南玩，可以介绍一下海南有哪些好玩的，好吃的么？":
        "1月份的海南气候凉爽，风景很美 ☀。以下是一些建议：\\n\\n1. 三亚：海滩、椰子树和热带雨林。\\n"
        "2. 陵水：参观吊脚楼，体验黎族风情。\\n\\n好吃的有海南鸡饭、椰子鸡和海南粉。祝您旅途愉快！",
    "哪里适合冲浪和潜水呢？": "三亚的大东海适合冲浪，分界洲岛适合潜水。",
    "可以帮我做一份旅游攻略吗？": "当然可以！东线：三亚、陵水、琼海。西线：海口、临高。",
    "数数": COUNT,
    "640 的 12.5% 是多少？": ("calculate", "```python\\ntool_call(expression='640 * 12.5 / 100')\\n```"),
    "80": "是 80。",
    "写代码": ("interpreter", "```python\\nprint(6 * 7)\\n7 * 8\\n```"),
    "42\\n56\\n": "运行结果是 42 和 56。",
}
asked = 0


def scripted(ids, **options):
    global asked
    asked += 1
    said = talk.progress[0][-1]["content"]  # the message that is being answered
    answer = ANSWERS.get(said, said)
    name, text = answer if isinstance(answer, tuple) else ("", answer)
    for id_ in tokenizer.build_single_message("assistant", name, text if said != "再来" else f"第 {asked} 次")[1:]:
        time.sleep(0.02 if said == "数数" else 0.004)  # time enough to press Stop, on a busy machine too
        if said == "坏":
            raise RuntimeError("the card is gone")
        yield id_


talk = ChatSession(tokenizer, scripted, tools=[calculate], seq_length=2048, sampling=config.generate.model_dump())
small = ChatSession(tokenizer, lambda ids: iter(tokenizer.encode("好的。", False)), "导游", seq_length=64, reserve=16)
"""
ATTACK = "<img src=x onerror=\"window.hacked = 'img'\"><script>window.hacked = 'script'</script>"
LINK = "[here](javascript:window.hacked='link') <|user|> <|system|>"


class Chat:
    """What a person sees of a chat cell, and does with it, by the names that a screen reader says."""

    def __init__(self, box: Locator):
        self.box, self.page = box, box.page
        self.messages = box.get_by_role("article")
        self.text = box.get_by_role("textbox", name="Message to the model")
        self.role = box.get_by_role("combobox", name="Role that speaks")
        self.status = box.get_by_role("status")
        self.chip = box.locator(".glm3kit-chip")

    def button(self, name: str) -> Locator:
        return self.box.get_by_role("button", name=name, exact=True)

    def say(self, text: str, role: str = "user") -> None:
        """Write a message and press Enter."""
        self.role.select_option(role)
        self.text.fill(text)
        self.text.press("Enter")

    def wait(self, messages: int) -> None:
        """Until there are so many messages, and the last one is complete."""
        expect(self.messages).to_have_count(messages)
        expect(self.button("Send")).to_be_visible()

    def said(self) -> list[str]:
        return self.box.locator(".glm3kit-body").all_inner_texts()


@pytest.fixture
def notebook(lab, page):
    """Notebook 07 with the scripted model at its end, all cells run, on random weights."""
    config_path = lab.folder / "tiny.yaml"
    config_path.write_text(SMALL.replace("TOKENIZER", str(ROOT / "glm3kit/tiny/tokenizer.model")), encoding="utf-8")
    hub = write_random_hub_weights(load_config(config_path).model, lab.folder / "hub")
    (lab.folder / "output").mkdir()
    convert_weights(hub, lab.folder / "output" / "merged.safetensors")

    document = nbformat.read(NOTEBOOK, as_version=4)
    added = SCRIPT.strip(), "chat_widget(talk)", "chat_widget(small)"
    document.cells += [nbformat.v4.new_code_cell(code) for code in added]
    for cell in document.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path = lab.folder / "07.ipynb"
    nbformat.write(document, path)
    lab.open(page, path)
    lab.run_all(page)
    return path, len(document.cells)


def test_notebook_07_is_talked_to_in_jupyterlab(lab, page: Page, notebook, pictures, tmp_path):
    path, cells = notebook
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))

    def picture(name: str) -> None:
        chat.box.screenshot(path=pictures / f"{name}.png")

    # the notebook's own cell, on a real model: its answer streams in, with its speed
    chat = Chat(page.locator(".glm3kit-chat").first)
    expect(page.locator(".glm3kit-chat")).to_have_count(3, timeout=120_000)
    before = chat.messages.count()
    assert before > 4, "what the cells above have said is there"
    chat.say("类型#裙*颜色#红色")
    chat.wait(before + 2)
    expect(chat.box).to_contain_text(re.compile(r"Context \d+ / 192 tokens · \d+ new · [\d.]+ tokens/s"))

    # the guide conversation of the document: the first line is one click away, the next ones too, or typed
    chat = Chat(page.locator(".glm3kit-chat").nth(1))
    expect(chat.messages).to_have_count(1)  # the system turn with the tools
    chat.button("Undo").scroll_into_view_if_needed()
    picture("1-empty")
    for turn, line in enumerate(GUIDE):
        expect(chat.chip).to_contain_text(f"{turn + 1}/4")
        if turn % 2:
            chat.say(line["text"], line["role"])
        else:
            chat.chip.click()
        chat.wait(3 + 2 * turn)
    expect(chat.messages.nth(1)).to_have_class(re.compile("glm3kit-system"))
    assert chat.said()[1::2] == [line["text"] for line in GUIDE]
    assert chat.said()[4].endswith("好吃的有海南鸡饭、椰子鸡和海南粉。祝您旅途愉快！")
    assert "很美 ☀。以下是一些建议：\n\n1. 三亚" in chat.said()[4], "line breaks are kept"
    assert chat.said()[8] == "当然可以！东线：三亚、陵水、琼海。西线：海口、临高。"
    expect(chat.chip).to_have_count(0)
    picture("2-guide")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=lab.url)
    chat.messages.last.get_by_role("button", name="Copy").click()
    expect(chat.status).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == chat.said()[8]

    # Shift+Enter breaks the line, and runs no cell; a composition's Enter sends nothing
    chat.text.fill("数")
    chat.text.press("Shift+Enter")
    expect(chat.text).to_have_value("数\n")
    chat.text.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(chat.messages).to_have_count(9)

    # stop in the middle of a long answer: what was said stays, and nothing more comes
    chat.say("数数")
    expect(chat.messages.nth(10)).to_contain_text(" 20 ")
    expect(chat.messages.nth(10)).to_have_class(re.compile("glm3kit-live"))
    picture("3-streaming")
    chat.button("Stop").click()
    chat.wait(11)
    said = chat.said()[-1]
    time.sleep(0.4)
    assert chat.said()[-1] == said and said.startswith("1 2 3") and " 1999" not in said
    expect(chat.messages.last).to_be_in_viewport()  # the conversation shows its end

    # undo gives the message back to be changed; edit a past turn and go on from there; regenerate
    chat.button("Undo").click()
    expect(chat.messages).to_have_count(9)
    expect(chat.text).to_have_value("数数")
    chat.messages.nth(5).hover()
    chat.messages.nth(5).get_by_role("button", name="Edit").click()
    editor = chat.box.get_by_role("textbox", name="Edit the message")
    editor.fill("再来")
    editor.press("Enter")
    chat.wait(7)
    first = chat.said()[-1]
    assert chat.said()[5] == "再来" and re.fullmatch(r"第 \d+ 次", first)
    chat.messages.last.get_by_role("button", name="Regenerate").click()
    expect(chat.messages.last).not_to_contain_text(first)
    chat.wait(7)
    assert chat.said()[5] == "再来" and re.fullmatch(r"第 \d+ 次", chat.said()[-1])

    # another theme, another language: the conversation stays
    told = chat.said()
    light = chat.box.evaluate("box => getComputedStyle(box).backgroundColor")
    lab.theme(page, "JupyterLab Dark")
    page.wait_for_function(
        "light => getComputedStyle(document.querySelector('.glm3kit-chat')).backgroundColor !== light", arg=light)
    chat.button("中文").click()
    expect(chat.box.get_by_role("toolbar", name="多角色对话")).to_be_visible()
    expect(chat.messages.last).to_have_attribute("aria-label", "助手")
    assert chat.said() == told

    # a tool, asked first: its arguments are shown, then it runs
    chat.box.get_by_role("button", name="工具").click()
    expect(chat.box.get_by_role("region", name="工具")).to_contain_text("计算算术表达式")
    chat.box.get_by_role("combobox", name="模型调用工具时").select_option("ask")
    chat.box.get_by_role("button", name="工具").click()
    chat.box.get_by_role("textbox", name="发给模型的消息").fill("640 的 12.5% 是多少？")
    page.keyboard.press("Enter")
    card = chat.box.get_by_role("group", name="模型请求调用")
    expect(card).to_contain_text('"expression": "640 * 12.5 / 100"')
    picture("4-tool-dark-chinese")
    assert chat.messages.count() == 9
    card.get_by_role("button", name="执行").click()
    expect(chat.messages).to_have_count(11)
    expect(chat.messages.last).to_contain_text("是 80。")
    page.set_viewport_size({"width": 720, "height": 900})
    picture("5-narrow-chinese")
    page.set_viewport_size({"width": 1180, "height": 900})
    chat.button("English").click()
    lab.theme(page, "JupyterLab Light")

    # and by itself
    chat.box.get_by_role("button", name="Tools").click()
    chat.box.get_by_role("combobox", name="When the model calls a tool").select_option("auto")
    chat.box.get_by_role("button", name="Tools").click()
    chat.say("640 的 12.5% 是多少？")
    chat.wait(15)
    assert chat.said()[-2:] == ["80", "是 80。"]

    # code becomes a new cell below, which the user runs; its output goes back
    chat.say("写代码")
    chat.wait(17)
    chat.button("Insert as a new cell below").click()
    cell = page.locator(".jp-CodeCell", has=page.locator(".cm-line", has_text=re.compile(r"^print\(6 \* 7\)$")))
    expect(cell).to_be_visible()
    expect(cell.locator(".jp-OutputArea-output")).to_have_count(0)  # nothing runs by itself
    lab.run_cell(page, cells - 1)  # below the chat cell, above the last one
    expect(cell.locator(".jp-OutputArea-output").last).to_contain_text("56")
    chat.button("Send its output back").click()
    chat.wait(19)
    assert chat.said()[-2:] == ["42\n56", "运行结果是 42 和 56。"]

    # markup from user and model is text
    for attack in (ATTACK, LINK):
        before = chat.messages.count()
        chat.say(attack, role="observation")
        chat.wait(before + 2)
        assert chat.said()[-2:] == [attack, attack]
    assert chat.box.locator("img, script, a, iframe").count() == 0
    assert page.evaluate("window.hacked") is None

    # an error shows its reason, gives the message back and leaves everything usable
    chat.say("坏")
    expect(chat.box.get_by_role("alert")).to_contain_text("RuntimeError: the card is gone")
    expect(chat.text).to_have_value("坏")
    picture("6-error")
    chat.say("好")
    chat.wait(25)
    expect(chat.box.get_by_role("alert")).to_have_count(0)

    # sampling starts from the configuration; what its rules refuse is said
    chat.button("Sampling").click()
    expect(chat.box.get_by_label("New tokens, at most")).to_have_value("24")
    chat.box.get_by_label("Temperature").fill("-1")
    chat.box.get_by_label("Temperature").press("Tab")
    expect(chat.status).to_contain_text("temperature: Input should be greater than 0")
    chat.button("Sampling").click()

    # save, forget, open: the same conversation
    told = chat.said()
    chat.button("Transcript").click()
    with page.expect_download() as download:
        chat.button("Save JSON").click()
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    assert [message["role"] for message in json.loads(saved.read_text(encoding="utf-8"))][:3] == [
        "system", "system", "assistant"]
    with page.expect_download() as download:
        chat.button("Save Markdown").click()
    markdown = tmp_path / download.value.suggested_filename
    download.value.save_as(markdown)
    assert read_transcript(markdown.read_text(encoding="utf-8")) == json.loads(saved.read_text(encoding="utf-8"))
    chat.button("Clear").click()
    expect(chat.messages).to_have_count(1)
    chat.box.locator("input[type=file]").set_input_files(markdown)
    expect(chat.messages).to_have_count(25)
    assert chat.said() == told
    chat.button("Transcript").click()

    # a window that is full: the page says what the model does not see any more
    full = Chat(page.locator(".glm3kit-chat").nth(2))
    for turn in range(3):
        full.say("请介绍一下三亚的海滩。")
        full.wait(3 + 2 * turn)
    expect(full.box).to_contain_text(re.compile(r"the \d oldest messages no longer fit"))
    expect(full.box.locator(".glm3kit-gone")).to_be_visible()
    expect(full.messages.nth(0)).not_to_have_class(re.compile("glm3kit-left-out"))  # the system turn stays
    expect(full.messages.nth(1)).to_have_class(re.compile("glm3kit-left-out"))
    full.box.screenshot(path=pictures / "7-full.png")

    # every control has a name
    nameless = chat.box.locator("button, select, textarea, input").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length")
    assert nameless == 0

    # the page is reloaded: display the session again, and the conversation is there, and goes on
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    lab.open(page, path)
    lab.run_cell(page, cells - 2)
    chat = Chat(page.locator(".glm3kit-chat", has_text="Tools (1)"))
    expect(chat.messages).to_have_count(25)
    assert chat.said() == told
    chat.button("Clear").click()
    chat.say("好")
    chat.wait(3)
    assert faults == []
