"""A grammar of Chinese clothing advertisements: attributes, their values, and sentences that use them.

The form of a row is ADGEN's (`类型#裙*颜色#红色*...` to a paragraph); every sentence here is our own. Three rules make
rows measurable: a value belongs to one attribute, no value stands inside another (the garment 裤 excepted), and no
sentence holds a value by itself. So the values found in a paragraph are exactly those it was written from.

    draw_row(random.Random(0))  # {"content": "类型#裙*颜色#红色*...", "summary": "这条裙..."}
"""

from dataclasses import dataclass
from random import Random

KIND = "类型"


@dataclass(frozen=True)
class Attribute:
    """Values of one attribute, clauses with the place of a value, and tails that may follow a clause."""

    values: tuple[str, ...]
    clauses: tuple[str, ...]  # {v} value, {b} the garment's body
    tails: tuple[str, ...]


@dataclass(frozen=True)
class Garment:
    """A kind of garment: its noun, measure word, name of its body, and the attributes that only some garments have."""

    noun: str
    measure: str
    body: str
    attributes: tuple[str, ...]


def attribute(values: str, clauses: str, tails: str) -> Attribute:
    """Read the three lists of an attribute, written as words between spaces."""
    return Attribute(tuple(values.split()), tuple(clauses.split()), tuple(tails.split()))


def garment(noun: str, measure: str, body: str, attributes: str) -> Garment:
    """Read a garment; its own attributes are words between spaces."""
    return Garment(noun, measure, body, tuple(attributes.split()))


GARMENTS = {
    "裙": garment("裙子", "条", "裙身", "领型 袖长 袖型 裙长 裙型"),
    "裤": garment("裤子", "条", "裤身", "裤长 裤型"),
    "上衣": garment("上衣", "件", "衣身", "领型 袖长 袖型 衣长 门襟"),
    "外套": garment("外套", "件", "衣身", "领型 袖型 衣长 门襟"),
    "马甲": garment("马甲", "件", "衣身", "领型 衣长 门襟"),
    "套装": garment("套装", "套", "衣身", "领型 袖长 袖型 门襟"),
}

ATTRIBUTES = {
    "颜色": attribute(
        "红色 白色 黑色 蓝色 绿色 粉色 紫色 灰色 黄色 橙色 米色 棕色 杏色 驼色 银色 酒红 藏青 卡其 咖啡 薄荷 焦糖 香芋",
        "以{v}为主色调 选用{v}配色 配色是{v} 整体为{v} 颜色选了{v} 染成{v} 用{v}铺满{b} {v}的色调耐看",
        "显白又百搭 看着很舒服 不挑肤色 很提气色 低调耐看 让人眼前一亮",
    ),
    "材质": attribute(
        "纯棉 亚麻 真丝 羊毛 牛仔 雪纺 蕾丝 羊绒 天丝 棉麻 丝绒 针织 缎面 皮革 莫代尔 灯芯绒 羽绒 醋酸 毛呢 桑蚕丝 "
        "网纱 麂皮",
        "采用{v}面料 面料选用{v} 由{v}制成 用料为{v} 甄选{v}材质 精选{v} 使用{v}缝制 {v}质地细腻",
        "手感很好 亲肤不扎人 上身舒适 不易起皱 穿着很自在 摸起来细腻",
    ),
    "风格": attribute(
        "简约 复古 甜美 休闲 优雅 通勤 文艺 街头 学院 运动 性感 田园 英伦 民族 森系 法式 韩系 轻奢 知性 清新 潮流 中性 "
        "淑女 日系",
        "走{v}路线 散发{v}气息 呈现{v}风格 带着{v}的味道 穿出{v}气质 透着{v}韵味 洋溢{v}的感觉 {v}味十足",
        "很有个性 让人难忘 怎么看都不腻 回头率很高 尽显品味 别具一格",
    ),
    "图案": attribute(
        "条纹 格子 波点 碎花 字母 卡通 豹纹 几何 千鸟格 迷彩 扎染 渐变 动物 花朵 星星 爱心 云朵 菱形 水墨 佩斯利",
        "饰以{v}图案 印有{v}花样 {b}上是{v} 图案为{v} 布满{v}图样 点缀{v}花样 融入{v}元素 {v}图案醒目",
        "生动有趣 打破单调 丰富层次 不显沉闷 增添活力 吸引目光",
    ),
    "版型": attribute(
        "修身 宽松 直筒 合体 廓形 茧型 紧身 收腰 落肩 显瘦",
        "版型为{v} 采取{v}剪裁 剪裁为{v} 按{v}版裁剪 做成{v}的轮廓 是{v}的版型 {v}版型好穿",
        "勾勒好身材 行动自如 遮住小赘肉 线条流畅 比例很好 不挑身形",
    ),
    "款式": attribute(
        "口袋 抽绳 流苏 破洞 荷叶边 蝴蝶结 亮片 木耳边 珍珠 钉珠 腰带 绑带 镂空 褶皱 铆钉 毛边 开衩 贴布",
        "细节有{v} 加入{v}装饰 缀上{v} 巧用{v} 配有{v}细节 加上{v}设计 以{v}作点缀 {v}设计精巧",
        "多了些看点 十分别致 做工讲究 增加造型感 小心思十足 精致又实用",
    ),
    "季节": attribute(
        "春季 夏季 秋季 冬季 早春 初夏 初秋 深冬",
        "适合{v}穿着 专为{v}打造 陪你度过{v} 是{v}的好选择 在{v}穿正好 {v}上身舒服",
        "冷暖刚好 天天都想穿 搭配很方便 一穿就爱上",
    ),
    "场合": attribute(
        "约会 上班 旅行 聚会 逛街 度假 郊游 宴会 校园 居家 派对 散步 面试 音乐节",
        "适合{v} 去{v}正合适 穿去{v}很得体 为{v}而设计 是{v}的好搭档 {v}时穿它正好",
        "轻松应对 自信出门 不怕出错 自在又好看",
    ),
    "领型": attribute(
        "圆领 V领 翻领 立领 方领 高领 一字领 娃娃领 荷叶领 西装领 连帽 海军领 船领 青果领",
        "领口是{v} 领部做成{v} 配以{v}设计 设计了{v} 领子选{v} {v}修饰颈部",
        "拉长颈部线条 露出锁骨 显得脸小 端庄大方",
    ),
    "袖长": attribute(
        "长袖 短袖 无袖 中袖 三分袖 五分袖 七分袖 九分袖",
        "袖子为{v} 袖长是{v} 裁成{v} 属于{v}款 {v}的长度适中",
        "修饰手臂 干净利落 抬手方便",
    ),
    "袖型": attribute(
        "泡泡袖 灯笼袖 喇叭袖 蝙蝠袖 荷叶袖 插肩袖 飞飞袖 花瓣袖 堆堆袖 公主袖",
        "袖型是{v} 缝上{v} 袖子做成{v} 肩部接{v} 带有{v} {v}俏皮灵动",
        "遮住拜拜肉 灵动可爱 更显娇俏 很有仙气",
    ),
    "衣长": attribute(
        "短款 长款 中款 露脐 及腰 及臀 过臀 齐胯",
        "衣长为{v} 衣长选{v} 设计成{v} 剪成{v}长度 {v}的衣长合适",
        "显高显腿长 遮住腰腹 优化比例",
    ),
    "门襟": attribute(
        "拉链 单排扣 双排扣 系带 套头 暗扣 盘扣 一粒扣 牛角扣 魔术贴",
        "门襟为{v} 前襟用{v} 以{v}开合 胸前是{v} {v}穿脱方便",
        "方便又牢固 顺滑好用 简单大方",
    ),
    "裙长": attribute(
        "及膝 过膝 拖地 及踝 迷你 超短 中长 膝上",
        "裙长为{v} 裙摆长度是{v} 长短为{v} 裙长选{v} {v}的长度刚好",
        "走路带风 露出小腿 修饰腿形",
    ),
    "裙型": attribute(
        "百褶 鱼尾 伞摆 A字 包臀 蓬蓬 蛋糕 开叉 一步 不规则 吊带 背带",
        "裙型是{v} 裙摆做成{v} 下身为{v}款 裁成{v}裙型 {v}裙摆飘逸",
        "摇曳生姿 优美动人 遮肉又好看 活泼可人",
    ),
    "裤长": attribute(
        "九分裤 七分裤 五分裤 三分裤 热裤 长裤 短裤 曳地裤",
        "长度为{v} 裁成{v} 裤长是{v} 属于{v} {v}长度利落",
        "露出脚踝 腿长一米八 清爽利索",
    ),
    "裤型": attribute(
        "阔腿 小脚 哈伦 工装 束脚 铅笔 萝卜 微喇 锥形 烟管",
        "裤型为{v} 裤腿做成{v} 裤管是{v} 腿部用{v}版 {v}裤型显腿直",
        "遮住腿部缺点 拉长双腿 走动自如",
    ),
}
COMMON = ("颜色", "材质", "风格", "图案", "版型", "款式", "季节", "场合")
NATURAL_ORDER = tuple(ATTRIBUTES)

COOL = {"亚麻", "真丝", "雪纺", "蕾丝", "天丝", "棉麻", "莫代尔", "桑蚕丝", "网纱"}
WARM = {"羊毛", "丝绒", "羊绒", "皮革", "灯芯绒", "羽绒", "毛呢", "麂皮"}
HOT_SEASONS, COLD_SEASONS = {"夏季", "初夏"}, {"冬季", "深冬"}
BARE = {"无袖", "短袖", "三分袖", "露脐", "超短", "迷你", "热裤", "短裤", "三分裤", "五分裤"}
CONFLICTS = (  # no garment has a value of both sides
    (COOL, COLD_SEASONS),
    (WARM, HOT_SEASONS),
    (BARE, COLD_SEASONS),
    ({"无袖"}, set(ATTRIBUTES["袖型"].values)),
    ({"连帽", "落肩"}, {"无袖", "一字领", "公主袖"}),
    ({"修身", "紧身", "合体", "收腰"}, {"阔腿", "哈伦", "工装", "蓬蓬", "伞摆", "宽松"}),
    ({"宽松", "廓形", "茧型", "直筒"}, {"小脚", "铅笔", "锥形", "包臀", "一步", "鱼尾", "微喇"}),
    ({"套头"}, {"西装领", "青果领", "翻领"}),
    ({"破洞", "毛边"}, {"雪纺", "真丝", "羽绒", "桑蚕丝", "羊绒"}),
)

OPENINGS = (  # {m} measure word, {t} noun
    "这{m}{t}", "这款{t}", "新款{t}", "本店的{t}", "推荐这{m}{t}", "热卖的{t}", "一{m}耐穿的{t}", "今年流行的{t}",
    "衣橱里少不了这{m}{t}", "想买{t}就看它", "设计师的{t}", "来看这{m}{t}",
)  # fmt: skip
PLAIN_OPENINGS = ("本季上新", "今日推荐", "新品到店", "值得一看的新款", "经典又好穿", "不只是好看")
ENDINGS = (
    "值得拥有", "怎么搭都好看", "让你更加自信", "喜欢的快来下单", "穿上就不想脱", "每天都有好心情", "送人也很体面",
    "细节处见用心", "轻松穿出好状态", "是衣橱里的常客",
)  # fmt: skip
PLAIN_ENDINGS = (
    "这样的{t}值得拥有", "真是一{m}好{t}", "快把这{m}{t}带回家", "这{m}{t}你一定会喜欢", "一{m}{t}就够了",
    "好{t}就是这样",
)  # fmt: skip
CONNECTIVES = ("", "", "", "", "同时", "而且", "并且")

Pairs = list[tuple[str, str]]  # (attribute, value), 类型 first


def conflicts(values: set[str]) -> bool:
    """Tell whether two of the values do not go together on one garment."""
    return any(values & one and values & other for one, other in CONFLICTS)


def draw_attributes(rng: Random) -> Pairs:
    """Draw 3 to 7 attributes (类型 is one of them) in a natural order with one or two of them moved."""
    kind = rng.choice(list(GARMENTS))
    possible = COMMON + 2 * GARMENTS[kind].attributes  # twice: what only this garment has is drawn more often
    wanted = rng.choice((2, 3, 4, 5, 5, 6, 6))
    while True:
        names = sorted(set(rng.sample(possible, wanted)), key=NATURAL_ORDER.index)
        values = [rng.choice(ATTRIBUTES[name].values) for name in names]
        if len(names) == wanted and not conflicts(set(values)):
            break
    pairs = list(zip(names, values, strict=True))
    for _ in range(rng.randint(0, 2)):
        pairs.insert(rng.randrange(len(pairs)), pairs.pop(rng.randrange(len(pairs))))
    return [(KIND, kind), *pairs]


def write_content(pairs: Pairs) -> str:
    """Write attributes in ADGEN's form: `类型#裙*颜色#红色`."""
    return "*".join(f"{name}#{value}" for name, value in pairs)


def read_content(content: str) -> Pairs:
    """Read what `write_content` wrote."""
    return [(name, value) for name, _, value in (item.partition("#") for item in content.split("*"))]


def write_clause(rng: Random, name: str, value: str, body: str) -> str:
    """Write one clause that uses the value, with a tail in two thirds of the cases."""
    clause = rng.choice(ATTRIBUTES[name].clauses).format(v=value, b=body)
    tail = rng.choice(ATTRIBUTES[name].tails)
    return f"{clause}，{tail}" if rng.random() < 2 / 3 else clause


def found_values(summary: str) -> list[str]:
    """List the values in a paragraph (those of 类型 too) in the order of their first place."""
    known = [*GARMENTS, *(value for each in ATTRIBUTES.values() for value in each.values)]
    return sorted((value for value in known if value in summary), key=summary.index)


def write_summary(rng: Random, pairs: Pairs) -> str:
    """Write a paragraph that uses every value once, in an order that is not the content's.

    The garment stands in the opening or, one time in four, in the ending; a sentence ends after a clause in a third of
    the cases.
    """
    kind = pairs[0][1]
    words = {"m": GARMENTS[kind].measure, "t": GARMENTS[kind].noun}
    order = pairs[1:]
    late = rng.random() < 1 / 4
    while order == pairs[1:]:
        rng.shuffle(order)
    opening = rng.choice(PLAIN_OPENINGS if late else OPENINGS).format(**words)
    sentence, sentences = [opening], []
    for place, (name, value) in enumerate(order):
        clause = write_clause(rng, name, value, GARMENTS[kind].body)
        sentence.append((rng.choice(CONNECTIVES) if place else "") + clause)
        if rng.random() < 1 / 3:
            sentences.append("，".join(sentence))
            sentence = []
    if late or rng.random() < 1 / 2:
        sentence.append(rng.choice(PLAIN_ENDINGS if late else ENDINGS).format(**words))
    return "。".join([*sentences, "，".join(sentence)] if sentence else sentences) + "。"


def draw_row(rng: Random) -> dict[str, str]:
    """Draw one row, {"content": ..., "summary": ...}."""
    pairs = draw_attributes(rng)
    return {"content": write_content(pairs), "summary": write_summary(rng, pairs)}
