"""How models begin when they do not do what they are asked, by language."""

from __future__ import annotations

import re

_VERBS = (
    "help|assist|comply|provide|answer|fulfil|fulfill|summarise|summarize|access|see|read|open|view|find|locate|give|"
    "offer|generate|create|share|discuss|engage|complete|continue|process|analyse|analyze|respond|support|do that"
    "|do this"
)
_UNABLE = "(?:cannot|can't|can not|could not|couldn't|won't|will not|(?:am|'m) (?:unable|not able) to)"
# What stands at an output's start, behind _APOLOGIES or without one.
REFUSALS = {
    "English": (
        rf"i ?{_UNABLE} (?:directly |currently |actually )?(?:{_VERBS})\b",
        r"i (?:do not|don't) have (?:any |the |enough |sufficient )?(?:access|document|text|information|context|file)",
        r"as an? (?:ai|artificial intelligence|large language model|language model)\b",
        r"(?:it (?:seems|looks like|appears) (?:that )?)?you (?:haven't|have not|didn't|did not) "
        r"(?:provided?|included?|attach(?:ed)?|shared?)\b",
        r"(?:it (?:seems|looks like|appears) (?:that )?)?(?:no|there is no) (?:document|text) "
        r"(?:(?:was|is|has been) )?(?:provided|included|attached|shared|given)\b",
        r"please (?:provide|share|paste|upload|attach) (?:me with )?(?:the|your|an?) (?:full )?"
        r"(?:document|text|file)\b",
    ),
    "German": (
        r"(?:ich kann|kann ich) (?:dir |ihnen |euch |dabei |hier )?(?:diese[nmrs]? |das |die |den |ihre[nmrs]? )?"
        r"(?:\w+ ){0,3}nicht (?:helfen|beantworten|zusammenfassen|erfüllen|bereitstellen|weiterhelfen|lesen|öffnen)",
        r"als (?:ki|künstliche intelligenz|sprachmodell)\b",
    ),
    "French": (
        r"je ne (?:peux|puis) pas (?:vous )?(?:aider|répondre|fournir|résumer|accéder|lire|ouvrir)",
        r"en tant qu'(?:ia|intelligence artificielle|modèle de langage)\b",
    ),
    "Spanish": (
        r"no puedo (?:ayudar|responder|proporcionar|resumir|acceder|leer|cumplir)",
        r"como (?:una )?(?:ia|inteligencia artificial)\b|como modelo de lenguaje\b",
    ),
    "Chinese": ("我(?:无法|不能)(?:提供|回答|帮助|访问|总结|满足|完成)", "作为(?:一个)?(?:ai|人工智能|语言模型)"),
    "Japanese": (
        "(?:[^。]{0,20})(?:お答え|回答|要約|提供|お手伝い)(?:は|を)?(?:することが|することは)?できません",
        "(?:私は)?aiとして",
    ),
}
_APOLOGIES = (
    "i'm (?:very |so |really )?(?:sorry|afraid)", "i am (?:very |so |really )?(?:sorry|afraid)", "sorry",
    "my apologies", "apologies", "i apologi[sz]e", "unfortunately", "leider", "entschuldigung", "(?:es )?tut mir leid",
    "(?:je suis )?désolée?", "malheureusement", "lo siento", "lamentablemente", "很?抱歉", "对不起",
    "申し訳(?:ありません|ございません)", "すみません", "残念ながら",
)  # fmt: skip
_START = re.compile(
    rf"(?:(?:{'|'.join(_APOLOGIES)})[^\w'\"]*(?:but |that |aber |mais |pero |但是?|が、?)?)?"
    rf"(?:as an ai[^,.]*, )?(?:{'|'.join(each for listed in REFUSALS.values() for each in listed)})"
)


def is_refusal(output: str) -> bool:
    """Whether an output begins with one of REFUSALS, whatever its case, marks and white space are."""
    start = " ".join(output.lstrip("*_#>\"'“ \r\n")[:300].split()).lower().replace("\u2019", "'")
    return _START.match(start) is not None
