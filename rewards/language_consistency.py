"""Whether the reasoning stays in one language: the share of its words, as in DeepSeek-R1 (section 2.3.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.reply import reasoning
from rl.errors import did_you_mean
from rl.sample import Sample

_RANGES = {
    "arabic": "\u0600-\u06ff\u0750-\u077f",
    "cyrillic": "\u0400-\u052f",
    "devanagari": "\u0900-\u097f",
    "greek": "\u0370-\u03ff",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f",
    "hangul": "\u1100-\u11ff\uac00-\ud7af",
    "hebrew": "\u0590-\u05ff",
    "kana": "\u3040-\u30ff\u31f0-\u31ff",
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    "thai": "\u0e00-\u0e7f",
}
_LANGUAGES = {
    **dict.fromkeys(("ar", "fa"), ("arabic",)),
    **dict.fromkeys(("bg", "ru", "uk"), ("cyrillic",)),
    **dict.fromkeys(("de", "en", "es", "fr", "id", "it", "nl", "pl", "pt", "sv", "tr", "vi"), ("latin",)),
    "el": ("greek",),
    "he": ("hebrew",),
    "hi": ("devanagari",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "th": ("thai",),
    "zh": ("han",),
}
_SINGLE = _RANGES["han"] + _RANGES["kana"]
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(rf"[{_SINGLE}]|(?:(?![{_SINGLE}])[^\W\d_])(?:(?![{_SINGLE}])[\w\u0300-\u036f'’])*(?<![\d_'’])")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConsistency:
    """words of the reasoning in the target language / words of the reasoning;  1 when it has no words.

    A word is a run of letters, or one Chinese or Japanese character, which stands for a word there. Digits,
    punctuation, LaTeX commands and single letters (variables) are not words. Languages are told apart by script alone,
    so ``language: de`` and ``language: en`` accept the same words.
    """

    language: str = "en"

    def __post_init__(self) -> None:
        if self.language not in _LANGUAGES:
            raise ValueError(f"language '{self.language}' is not known; {did_you_mean(self.language, _LANGUAGES)}")

    def __call__(self, sample: Sample) -> float:
        target = re.compile(f"[{''.join(_RANGES[script] for script in _LANGUAGES[self.language])}]")
        found = words(reasoning(sample))
        return sum(target.match(word) is not None for word in found) / len(found) if found else 1.0


def words(text: str) -> list[str]:
    """The words of a text, as :class:`LanguageConsistency` counts them."""
    candidates = _WORD.findall(_LATEX_COMMAND.sub(" ", text))
    return [word for word in candidates if len(word) > 1 or re.match(f"[{_SINGLE}]", word)]
