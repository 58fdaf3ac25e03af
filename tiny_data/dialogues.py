"""A grammar of a shop assistant's chats: small talk, advice, advertisements on request, and tool calls.

A record has the form of ChatGLM3's multi-turn fine-tuning data, {"conversations": [{"role": ..., "content": ...}]},
with "tools" where a turn {"role": "tool", "name", "parameters", "observation"} occurs. Advice follows from the grammar
of the advertisements (`COOL` materials suit `HOT_SEASONS`), so that both agree.

    draw_record(random.Random(0))  # {"conversations": [{"role": "user", "content": "你好"}, ...]}
"""

from collections.abc import Callable
from random import Random
from typing import Any

from tiny_data.grammar import ATTRIBUTES, COLD_SEASONS, COOL, GARMENTS, HOT_SEASONS, WARM, draw_row

Turn = dict[str, Any]
Record = dict[str, Any]

NAMES = ("小美", "小林", "小雅", "小米", "小安", "小夏", "小北", "小满")
JOBS = {
    "导购": "推荐衣服和回答问题",
    "文案": "根据商品属性写广告",
    "客服": "查询价格和库存",
    "穿搭顾问": "告诉你怎么搭配",
}
GREETINGS = ("你好", "您好", "嗨", "在吗", "早上好", "晚上好")
WELCOMES = ("你好，欢迎光临，想看点什么？", "你好呀，有什么可以帮你？", "您好，请把商品属性发给我，我来写广告。")
WHO = ("你是谁？", "你叫什么名字？", "介绍一下你自己。", "请问你是？")
THANKS = ("谢谢", "谢谢你", "写得真好", "太好了", "不错，就用这个")
PLEASURES = ("不客气，祝你生意兴隆。", "很高兴能帮到你。", "不用谢，随时找我。", "你喜欢就好。")
SKILLS = ("你会做什么？", "你能帮我什么？", "怎么用？")
REQUESTS = ("", "", "", "", "请写一段广告：", "写广告：", "帮我写文案：")  # most often the content stands alone

CITIES = ("北京", "上海", "广州", "深圳", "杭州", "成都", "武汉", "西安", "南京", "重庆", "青岛", "昆明")
WEATHERS = ("晴", "多云", "小雨", "大风", "小雪")
SIZES = ((155, "S"), (162, "M"), (168, "L"), (174, "XL"))  # up to so many centimetres

COLOURS = ATTRIBUTES["颜色"].values
PARTNERS = dict(zip(COLOURS, COLOURS[7:] + COLOURS[:7], strict=True))  # each colour has one that goes well with it
EITHER = tuple(value for value in ATTRIBUTES["材质"].values if value not in COOL | WARM)


def turn(role: str, content: str) -> Turn:
    """Make a turn without metadata."""
    return {"role": role, "content": content}


def persona(rng: Random) -> tuple[str, str]:
    """Draw a persona: the system turn's text, and what the assistant then says of itself."""
    name, (job, skill) = rng.choice(NAMES), rng.choice(list(JOBS.items()))
    told = rng.choice((f"你是{job}{name}，负责{skill}。", f"你叫{name}，是店里的{job}，会{skill}。"))
    return told, f"我是{job}{name}，可以{skill}。"


def small_talk(rng: Random) -> list[Turn]:
    """Draw a greeting or a question about the assistant, with or without a persona."""
    if rng.random() < 1 / 4:
        return [turn("user", rng.choice(GREETINGS)), turn("assistant", rng.choice(WELCOMES))]
    question = rng.choice(WHO)
    if rng.random() < 3 / 4:
        told, self_description = persona(rng)
        turns = [turn("system", told), turn("user", question), turn("assistant", self_description)]
    else:
        turns = [turn("user", question), turn("assistant", "我是小衣，一个写服装广告的小助手。")]
    if rng.random() < 1 / 3:
        turns += [turn("user", rng.choice(SKILLS)), turn("assistant", "把商品属性发给我，我就能写出广告。")]
    return turns


def advice(rng: Random) -> list[Turn]:
    """Draw a question about colours or materials; the answer agrees with the grammar of the advertisements."""
    if rng.random() < 1 / 2:
        colour = rng.choice(COLOURS)
        question = rng.choice(("{c}配什么颜色好看？", "{c}和什么颜色搭？", "我有一件{c}上衣，裤子选什么颜色？"))
        answer = rng.choice(("{c}配{p}很好看。", "建议用{p}来配{c}。", "可以试试{p}，和{c}很搭。"))
        words = {"c": colour, "p": PARTNERS[colour]}
    else:
        season = rng.choice(ATTRIBUTES["季节"].values)
        suitable = COOL if season in HOT_SEASONS else WARM if season in COLD_SEASONS else set(EITHER)
        one, other = rng.sample(sorted(suitable), 2)
        reason = "轻薄凉快" if season in HOT_SEASONS else "厚实保暖" if season in COLD_SEASONS else "冷暖刚好"
        question = rng.choice(("{s}适合穿什么材质？", "{s}选什么面料好？", "{s}穿什么面料舒服？"))
        answer = rng.choice(("{s}适合{a}和{b}，{r}。", "推荐{a}或者{b}，{r}。"))
        words = {"s": season, "a": one, "b": other, "r": reason}
    return [turn("user", question.format(**words)), turn("assistant", answer.format(**words))]


def thanks(rng: Random) -> list[Turn]:
    """Draw a closing exchange."""
    return [turn("user", rng.choice(THANKS)), turn("assistant", rng.choice(PLEASURES))]


def advertisement(rng: Random) -> list[Turn]:
    """Draw a request with a content in ADGEN's form and the paragraph that answers it."""
    row = draw_row(rng)
    return [turn("user", rng.choice(REQUESTS) + row["content"]), turn("assistant", row["summary"])]


def advertisement_chat(rng: Random) -> Record:
    """Draw an advertisement, perhaps after a persona or a greeting, perhaps before thanks or a question."""
    before, after = rng.random(), rng.random()
    turns = [turn("system", persona(rng)[0])] if before < 1 / 5 else []
    if 1 / 5 < before < 2 / 5:
        turns += [turn("user", rng.choice(GREETINGS)), turn("assistant", rng.choice(WELCOMES))]
    turns += advertisement(rng)
    if after < 1 / 5:
        turns += thanks(rng)
    elif after < 2 / 5:
        turns += advice(rng)
    return {"conversations": turns}


def talk(rng: Random) -> Record:
    """Draw a chat of small talk, advice, or one after the other."""
    kind = rng.randrange(3)
    turns = small_talk(rng) if kind else []
    return {"conversations": turns + (advice(rng) if kind < 2 else [])}


def tool(name: str, description: str, parameter: str, kind: str = "string") -> dict[str, Any]:
    """Describe a tool with one required parameter in the form of the published chat demo."""
    schema = {"type": "object", "properties": {parameter: {"type": kind}}, "required": [parameter]}
    return {"name": name, "description": description, "parameters": schema}


GET_PRICE = tool("get_price", "查询商品价格", "item")
GET_STOCK = tool("get_stock", "查询商品库存", "item")
GET_SIZE = tool("get_size", "按身高推荐尺码", "height", "integer")
GET_WEATHER = tool("get_weather", "查询城市天气", "city")

# Tool, question, parameters, observation, answer.
Call = tuple[dict[str, Any], str, dict[str, Any], dict[str, Any], str]


def ask_price(rng: Random) -> Call:
    """Ask what a garment costs."""
    kind = rng.choice(list(GARMENTS))
    noun, price = GARMENTS[kind].noun, rng.randrange(59, 900, 10)
    question = rng.choice(("{n}多少钱？", "{n}卖什么价？", "查一下{n}的价格")).format(n=noun)
    return GET_PRICE, question, {"item": noun}, {"price": price}, f"{noun}的价格是{price}元。"


def ask_stock(rng: Random) -> Call:
    """Ask how many of a garment in one colour are left."""
    garment, count = GARMENTS[rng.choice(list(GARMENTS))], rng.choice((0, *range(2, 60)))
    item = rng.choice(COLOURS) + garment.noun
    question = rng.choice(("{i}还有货吗？", "有{i}吗？", "查一下{i}的库存")).format(i=item)
    answer = f"有货，{item}还有{count}{garment.measure}。" if count else f"{item}卖完了。"
    return GET_STOCK, question, {"item": item}, {"stock": count}, answer


def ask_size(rng: Random) -> Call:
    """Ask which size suits a height."""
    height = rng.randrange(150, 174)
    size = next(name for limit, name in SIZES if height <= limit)
    question = rng.choice(("我身高{h}，穿什么尺码？", "身高{h}选多大？", "我{h}厘米，该买哪个码？")).format(h=height)
    return GET_SIZE, question, {"height": height}, {"size": size}, f"建议你选{size}码。"


def ask_weather(rng: Random) -> Call:
    """Ask what to wear in a city today."""
    city, weather, degrees = rng.choice(CITIES), rng.choice(WEATHERS), rng.randrange(2, 35)
    suitable = COOL if degrees >= 22 else WARM if degrees < 12 else set(EITHER)
    question = rng.choice(("今天{c}穿什么好？", "我在{c}，今天怎么穿？", "{c}今天适合穿什么？")).format(c=city)
    answer = f"{city}今天{weather}，{degrees}度，适合穿{rng.choice(sorted(suitable))}。"
    return GET_WEATHER, question, {"city": city}, {"weather": weather, "temperature": degrees}, answer


QUESTIONS: tuple[Callable[[Random], Call], ...] = (ask_price, ask_stock, ask_size, ask_weather)


def tool_chat(rng: Random) -> Record:
    """Draw a record with one tool: question, call with its observation, and the answer that uses it."""
    described, question, parameters, observation, answer = rng.choice(QUESTIONS)(rng)
    called = {"role": "tool", "name": described["name"], "parameters": parameters, "observation": observation}
    return {"tools": [described], "conversations": [turn("user", question), called, turn("assistant", answer)]}


def draw_record(rng: Random) -> Record:
    """Draw one record: 3 in 5 about an advertisement, 1 in 5 with a tool, 1 in 5 talk."""
    return rng.choice((advertisement_chat, advertisement_chat, advertisement_chat, tool_chat, talk))(rng)
