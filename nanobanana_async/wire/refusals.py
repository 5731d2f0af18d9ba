"""What the words of a rejection, of a failed task, or of a model mean."""

import re
from typing import Final

from nanobanana_async.models import ReasonKind, Task, TaskStatus

_MEANS: Final = r"(?:credits?|balance|funds|quota)"
_MAX_CHARS: Final = 10_000
"""Part of a text that is read."""
_QUOTED: Final = re.compile(r"(?<!\w)'[^']{0,500}'(?!\w)|\"[^\"]{0,500}\"|“[^”]{0,500}”|「[^」]{0,500}」|«[^»]{0,500}»")
_EMPTY_ACCOUNT: Final = re.compile(
    rf"insufficient[ _-]+(?:[^\W_]+[ _-]+)?{_MEANS}\b"
    rf"|not enough (?:\w+ )?{_MEANS}\b"
    rf"|(?:out of|ran out of|run out of|exceeded your|exhausted your) (?:\w+ )?{_MEANS}\b"
    rf"|(?<!white )\b{_MEANS}(?: balance)? (?:is |are |has been |have been )?"
    r"(?:too low|insufficient|not enough|not sufficient|exhausted|used up|depleted|exceeded)\b"
    rf"|\bno (?:more )?{_MEANS} (?:left|remaining|available)\b"
    rf"|n[o']t have (?:a |any |enough |sufficient )?(?:\w+ )?{_MEANS}\b"
    r"|余额不足|额度不足|积分不足|点数不足",
    re.IGNORECASE,
)
"""Whole phrases, because single words such as "balance" occur in prompts and in rejections of prompts.

No status is documented for an empty account. Source: the messages of this and similar services in public clients.
"""


def says_empty_account(message: str) -> bool:
    """Return whether the service says that the account is empty."""
    return _EMPTY_ACCOUNT.search(_without_quotes(message)) is not None


# Sources: `FinishReason` and `BlockedReason` of the Gemini API; its `finishMessage` ("... could not be generated. This
# output contains sensitive words that violate Google's Responsible AI practices", BerriAI/litellm 20357); messages of
# gateways ("blocked [IMAGE_SAFETY]: ... safety policy violation, please modify your prompt", jeffstric/ZJT 494); texts
# of models that decline, in the languages of their users.
_REFUSED: Final = (
    r"(?-i:\b(?:IMAGE_)?(?:SAFETY|RECITATION|PROHIBITED_CONTENT)\b|\b(?:BLOCKLIST|SPII)\b)",
    r"\bsafety (?:system|filter|polic|guideline|setting|reason|concern|violation|check|rule)|\bunsafe\b",
    r"\b(?:content|usage|use|community|safety|google'?s?|openai'?s?) (?:policy|policies|guidelines)\b",
    r"\bviolat(?:e|es|ed|ing|ion)\b|\bresponsible ai\b|\bprohibited\b|\bdisallowed\b|\binappropriate\b",
    r"\bmoderat(?:ion|ed)\b|\bflagged\b|\bsensitive (?:word|content)|\bnsfw\b|\bsexual|\bnudity\b",
    r"\bcopyright(?:ed)?\b|\bintellectual property\b|\bprompt (?:was |has been )?(?:rejected|refused|blocked)\b",
    (
        r"\b(?:can(?:no|')?t|can not|unable to|not able to|won't|will not|must decline to|not allowed to) (?!be )"
        r"(?:\w+ ){0,2}?(?:create|generate|produce|make|draw|edit|depict|fulfil+|help|assist|comply)"
    ),
    r"违规|违反|敏感|安全策略|安全政策|内容审核|审核不通过|审核未通过|版权|不当内容|无法生成|不能生成|拒绝生成|我无法|我不能",
    r"ポリシー|ガイドライン|安全上|著作権|不適切|生成できません|お応えできません|作成できません",
    r"정책|안전 문제|저작권|부적절|생성할 수 없|만들 수 없|도와드릴 수 없",
    r"\bno puedo (?:crear|generar|ayudar|editar|hacer)|\bpol[ií]ticas? de (?:contenido|seguridad)|derechos de autor",
    r"\bn[ãa]o posso (?:criar|gerar|ajudar|editar|fazer)|\bpol[ií]ticas? de (?:conte[úu]do|seguran)|direitos autorais",
    r"\bne (?:peux|suis) pas (?:\w+ ){0,3}?(?:cr[ée]er|g[ée]n[ée]rer|aider|modifier)|droits d'auteur",
    r"\bpolitiques? (?:de|d')\w*|r[èe]gles de s[ée]curit[ée]",
    r"\bkann (?:\w+ ){0,6}?nicht (?:erstellen|generieren|erzeugen|bearbeiten|helfen)|Richtlinie|Urheberrecht",
    r"\bnon posso (?:creare|generare|aiutare|modificare)|norme (?:sui|di|sulla)|diritt\w* d'autore",
    r"не могу (?:\w+ )?(?:созда|сгенериро|помочь|изобра)|политик|авторск|запрещ|правил безопасности",
    r"لا أستطيع|لا يمكنني|حقوق النشر|सामग्री नीति|नहीं बना सकत",
)
_EMPTY: Final = (r"\bno[_ ]images?\b", r"\bempty (?:response|result)")
_ERROR: Final = (
    r"\binternal\b|\bserver error\b|\b(?:un|not )available\b|\boverload|\bcapacity\b|\bbusy\b|\bupstream\b",
    r"\btimed? ?out\b|\bdeadline\b|\btry again\b|\bretry\b|\bresource.exhausted\b|\brate.limit|\bquota\b",
    r"\bimage_other\b|\bnetwork\b|\bconnection\b|\b(?:status|code|error|http)\W{0,3}5\d\d\b",
    r"超时|服务器|繁忙|稍后|内部错误|系统错误|网络|再試行|エラー|오류|다시 시도|внутренн|попробуйте",
)


def _one_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(phrases), re.IGNORECASE)


_REFUSED_WORDS, _EMPTY_WORDS, _ERROR_WORDS = map(_one_of, (_REFUSED, _EMPTY, _ERROR))


def classify_reason(task: Task) -> ReasonKind:
    """Return why the final *task* has no image, by the words of `task.reason` and `task.texts`.

    Quoted text is not read, because it may be the prompt. A text of the model refuses, or says nothing: it may chat
    about errors. A refusal goes before the rest, for it often ends with "try again".
    """
    reason = _without_quotes(task.reason or "")
    if _REFUSED_WORDS.search(reason) or _REFUSED_WORDS.search(_without_quotes(" ".join(task.texts))):
        return ReasonKind.REFUSED
    if _EMPTY_WORDS.search(reason):
        return ReasonKind.EMPTY
    if _ERROR_WORDS.search(reason):
        return ReasonKind.ERROR
    return ReasonKind.EMPTY if task.status is TaskStatus.SUCCESS else ReasonKind.UNKNOWN


def _without_quotes(text: str) -> str:
    """Return *text* without what it quotes. The apostrophes of "doesn't" and "it's" are not quotes."""
    return _QUOTED.sub("", text[:_MAX_CHARS].replace("\u2019", "'"))
