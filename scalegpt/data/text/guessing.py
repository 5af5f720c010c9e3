"""Guess the encoding of text that is not UTF-8, if the guess is sure.

Most byte strings decode in dozens of encodings. The right encoding turns the bytes above 127 into letters of one language:
mostly its frequent letters, and in lower case inside words. An encoding's score is the log-likelihood of the decoded letters
in the language that fits them best. The encoding with the best score is returned if its score is far above that of every
encoding that decodes to another text.
"""

import codecs
import math
import unicodedata
from functools import cache

_COMMONNESS = {
    0.0: ("latin-1", "cp1252"),
    -1.5: ("iso8859-15", "cp1250", "iso8859-2", "cp1251", "koi8-r", "cp1253", "cp1254", "cp1255", "cp1256", "gb18030", "big5",
           "cp932", "euc-jp", "cp949"),
    -2.5: ("koi8-u", "iso8859-5", "cp866", "iso8859-7", "iso8859-9", "cp1257", "cp1258", "cp874", "mac-roman", "cp850",
           "cp437", "cp852"),
    -4.0: ("mac-cyrillic", "iso8859-8", "iso8859-6", "iso8859-4", "iso8859-13", "mac-latin2", "cp737"),
}  # fmt: skip
"""Log of the estimated frequency among files, 0 for the most frequent → the encodings with this frequency."""

ENCODINGS = {encoding: share for share, encodings in _COMMONNESS.items() for encoding in encodings}
"""Encoding → log of its estimated frequency, the most frequent first.

If several encodings decode a sample to the same text, the first of them is the guess.
"""

_MULTIBYTE = frozenset({"gb18030", "big5", "cp932", "euc-jp", "cp949"})
_OFTEN_UTF8 = _MULTIBYTE | {"cp866", "koi8-r", "koi8-u", "mac-roman", "cp737", "cp852"}
"""Encodings in whose text some byte sequences are, by chance, valid UTF-8 characters."""

_LANGUAGES = {
    "English": "’“”—‘–…é£•°",
    "French": "éèàêçùôîâûëïœüæ",
    "Spanish": "óíáéñúü",
    "German": "üäößéà",
    "Italian": "èàòùìéïî",
    "Portuguese": "ãçáéíóêõâàúôü",
    "Catalan": "àéèóíòçúïü",
    "Dutch": "ëéïèöüê",
    "Swedish": "äöåéüà",
    "Danish": "øåæéöäüò",
    "Icelandic": "áíðéþæóöúý",
    "Estonian": "äõüöšž",
    "Western": "éüäöáíóñçèàêãøåßâôîúûëïìòùõæœýÿ",
    "Polish": "ąęłóżśćńź",
    "Czech": "íáéěřýžčšůúňťďóöü",
    "Slovak": "áíéčžšýúľťôňďäóŕĺ",
    "Hungarian": "áéöőóíüúű",
    "Croatian": "čšžćđ",
    "Romanian": "ăîâşţșț",
    "Turkish": "ıüşğöçiâî",
    "Lithuanian": "ėšžųįąčęū",
    "Latvian": "āīēšņūļžķģč",
    "Vietnamese": "\u0301\u0300\u0323đâươêôă\u0309\u0303àáéèíìóòúùýýãõ",
    "Russian": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё",
    "Ukrainian": "оанивітерслкдупмязьбгчйхїжшюцєщфґ",
    "Bulgarian": "аоеинтрсвлдкпмгузбъяцчйжщхшюфь",
    "Serbian": "аоиенрстувкдјпмлзбгшчцжћњхљђфџ",
    "Greek": "αοιετνσηρπκμλυςωάίόέδγχθύήφώβζξψϊϋ",
    "Hebrew": "יוהלאתרבשמןםנחדפקעגטזסצכךףץ",
    "Arabic": "اليمونترةبعدسفهكقحجأشصىطخءئضذثزغظؤإآ\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652",
    "Thai": (
        "านรอกเงมยลวดทสตะปบคหแจพชขใไโผซถธศษณฐภญฉฟฝฎฏฆ"
        "\u0e31\u0e34\u0e35\u0e37\u0e38\u0e39\u0e47\u0e48\u0e49\u0e4c\u0e32\u0e33"
    ),
    "Chinese": (
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
        "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    ),
    "Traditional": (
        "的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡"
        "用道行所然家種事成方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實"
    ),
    "Japanese": (
        "のいにしたるとはてをがなでかすれらもりうこさくきっんあまえよそめどちけみせろおわひつ上やじ日人ばへ年"
        "ー大一本中ンスルトイアラリクドシ"
    ),
    "Korean": (
        "이다의는에을가하고은를로지도사리기한서나어아자대인있그해시들라일으수정과부만보게여스주전원제니것와장면"
    ),
}
"""Letters outside ASCII by language, the most frequent first."""

_SIGNS = frozenset("“”‘’«»„‚–—…€£§°©®™•¿¡ºª·№½¼²³µ×´\xa0\xad")
_WIDE_SIGNS = frozenset("、。，．「」『』：；！？（）〜～・…《》〈〉【】\u3000“”‘’—")
_EAST = {
    "Chinese": ("gb2312", 0xD7),
    "Traditional": ("big5", 0xC6),
    "Japanese": ("euc-jp", 0xCF),
    "Korean": ("euc-kr", 0xC8),
}
"""Language → codec of its national character set, and the largest lead byte of the common characters in that set."""

_STRAY, _FOREIGN, _RARE, _VERY_RARE, _SIGN, _WRONG_CASE, _TORN = -11.0, -9.0, -7.5, -10.0, -4.0, -5.0, -5.0
_CLEARLY, _CLEARLY_OF_FEW, _FEW = 4.0, 6.0, 8
"""By how much the best score must exceed the next one; scores are natural logarithms.

``_CLEARLY_OF_FEW`` applies to texts with fewer than ``_FEW`` characters outside ASCII.
"""
_FITTING, _FITTING_WIDE = -5.5, -8.0
"""The least mean log-likelihood of a character, for letters and for East Asian characters.

A text with a lower mean is in no known language.
"""


def guess(sample: bytes, *, like_utf8: bool = False) -> str | None:
    """Guess the encoding of a sample of text.

    Args:
        sample: lines with bytes above 127; only the last line may be cut inside a character.
        like_utf8: whether some of the bytes are valid UTF-8 characters; only :data:`_OFTEN_UTF8` are then considered.

    Returns:
        One of :data:`ENCODINGS`; None if no encoding fits, or several fit about equally well.
    """
    scores: dict[str, float] = {}  # text → score
    names: dict[str, str] = {}
    for encoding, share in ENCODINGS.items():
        if like_utf8 and encoding not in _OFTEN_UTF8:
            continue
        try:
            text = codecs.getincrementaldecoder(encoding)().decode(sample)  # the last character may be cut
        except UnicodeDecodeError:
            continue
        if text not in scores:
            scores[text], names[text] = share + _likelihood(text), encoding
    if not scores:
        return None
    best, *others = sorted(scores, key=lambda text: -scores[text])
    if scores[best] < _least(best):
        return None
    count = sum(not character.isascii() for character in best)
    if others and scores[best] - scores[others[0]] < (_CLEARLY_OF_FEW if count < _FEW else _CLEARLY):
        return None
    return names[best]


def _least(text: str) -> float:
    """The log-likelihood that a text must reach to count as written in a known language."""
    outside = [character for character in text if not character.isascii()]
    return sum(_FITTING_WIDE if _script(character) == "EAST" else _FITTING for character in outside)


def _likelihood(text: str) -> float:
    """Log-likelihood of a text's characters outside ASCII, in the language that fits best, plus penalties (at most 0)."""
    counted: dict[str, int] = {}
    fixed = 0.0
    for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if character.isascii():
            continue
        small = character.lower()[0]  # the Turkish İ has two characters in lower case
        counted[small] = counted.get(small, 0) + 1
        fixed += _blemish(before, character, after)
    return fixed + max(
        sum(number * _log_share(character, language) for character, number in counted.items())
        for language in _LANGUAGES
    )


def _blemish(before: str, character: str, after: str) -> float:
    """The penalty, at most 0, for a character inside a word that is a capital, a sign or of another script."""
    if character.isalpha():
        turns = (character.isupper() and before.islower()) + (character.islower() and after.isupper())
        wrong = _WRONG_CASE * turns
        mixed = any(each.isalpha() and _script(each) != _script(character) for each in (before, after))
        return wrong + (_TORN if mixed else 0.0)
    is_torn = (
        before.isalpha() and after.isalpha() and character not in "’\xad·" and not unicodedata.combining(character)
    )
    return _TORN if is_torn and character not in _WIDE_SIGNS else 0.0


@cache
def _script(character: str) -> str:
    name = unicodedata.name(character, "").partition(" ")[0]
    return "EAST" if name in {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"} else name


@cache
def _log_share(character: str, language: str) -> float:
    """Log of a character's estimated share of the non-ASCII text: letters by Zipf's law, all signs alike."""
    letters = _LANGUAGES[language]
    wide = language in _EAST
    place = letters.find(character)
    if place >= 0:
        weight = sum(1 / (rank + 1.5) for rank in range(len(letters)))
        return math.log((0.6 if wide else 0.9) / (place + 1.5) / weight)
    if character in (_WIDE_SIGNS if wide else _SIGNS):
        return _SIGN
    if wide and _script(character) == "EAST":
        return _east_share(character, *_EAST[language])
    return _FOREIGN if character.isalpha() else _STRAY


def _east_share(character: str, codec: str, last_usual: int) -> float:
    """Log share of a less frequent East Asian character; higher if its first byte in ``codec`` is at most ``last_usual``."""
    try:
        lead = character.encode(codec)[0]
    except UnicodeEncodeError:
        return _STRAY
    return _RARE if lead <= last_usual else _VERY_RARE
