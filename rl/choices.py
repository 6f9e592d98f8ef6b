"""The words that keys of a recipe take."""

from __future__ import annotations

from enum import Enum, StrEnum


class EngineKind(StrEnum):
    """What generates: the embedded engine, or vLLM."""

    torch = "torch"
    vllm = "vllm"


class Dsa(StrEnum):
    """Whose indexer, top-k and sparse attention generate under vLLM."""

    vllm = "vllm"
    keel = "keel"


class Placement(Enum):
    """Whether engines and learner have GPUs of their own or share them."""

    split = "split"
    shared = "shared"


class Aggregation(StrEnum):
    """How tokens' losses are averaged over an optimizer step."""

    sequence_mean = "sequence_mean"
    token_mean = "token_mean"


class ZeroVariance(Enum):
    """What becomes of groups whose rewards are all equal."""

    keep = "keep"
    replace = "replace"


class IndexerTraining(StrEnum):
    """Whether the lightning indexer learns (paper Eq. 3 and 4) while the policy does."""

    frozen = "frozen"
    kl = "kl"


class Offload(StrEnum):
    """Where something is kept while it is not used."""

    none = "none"
    cpu = "cpu"


class DoctorAct(StrEnum):
    """What the hang doctor does about what it finds."""

    none = "none"
    warn = "warn"
    recover = "recover"
    stop = "stop"


class WandbMode(StrEnum):
    """Whether Weights & Biases is told now or later."""

    online = "online"
    offline = "offline"


class PromptStyle(StrEnum):
    """What a prompt says of thinking and tools, as in DeepSeek-V3.2's cold start."""

    none = "none"
    reasoning = "reasoning"
    tools = "tools"
    thinking_tools = "thinking_tools"


class ContextStrategy(StrEnum):
    """What an episode drops when its context has grown long (DeepSeek-V3.2, section 4.4)."""

    none = "none"
    summary = "summary"
    discard_75 = "discard_75"
    discard_all = "discard_all"


class Alarm(StrEnum):
    """What a run watches in its own metrics; docs/alarms.md says what each one means."""

    mismatch = "mismatch"
    replay = "replay"
    kept = "kept"
    entropy = "entropy"
    masked = "masked"
    clipped = "clipped"
    saturation = "saturation"
    zero_variance = "zero_variance"
    dominance = "dominance"
    length = "length"
    truncated = "truncated"
