"""The recipe: every setting of a run, its default, and what it means.

Defaults live here and nowhere else. A value that engine and learner share exists once (``sampling``, ``objective``).
``rl.recipe.load_recipe`` reads the YAML and the command-line overrides into a :class:`Recipe`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from rl.choices import (
    Aggregation,
    Alarm,
    ContextStrategy,
    DoctorAct,
    Dsa,
    EngineKind,
    IndexerTraining,
    Offload,
    Placement,
    PromptStyle,
    WandbMode,
    ZeroVariance,
)

MISSING = "???"
RESUME_NEVER, RESUME_AUTO = "never", "auto"


@dataclass(frozen=True, kw_only=True)
class RewardUse:
    """One reward of a domain: ``{use: math_answer, weight: 1.0, args: {...}}``."""

    use: str = MISSING
    """Name of a reward that ships with Keel, or the dotted path of a function: ``my_package.rewards:brevity``."""
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    name: Optional[str] = None
    """Name of its part in metrics; defaults to the last word of ``use``."""
    timeout_s: float = 30.0
    """Seconds one call may take before its worker is killed."""
    retries: int = 1
    """How often a call that raised or hung is tried again before its sample counts as failed."""
    cache: bool = False
    """Whether a sample that says the same to the same prompt as an earlier one gets the earlier outcome without a call;
    not for functions of a whole group."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentUse:
    """The tools of a domain and the budgets of its episodes: ``{use: code_interpreter, max_turns: 20, args: {...}}``.

    An episode that has used up a budget ends there, counts as truncated, and is scored and trained like any other.
    """

    use: str = MISSING
    """Name of an environment that ships with Keel, or the dotted path of a class or a function."""
    args: dict[str, Any] = field(default_factory=dict)
    describe_tools: bool = True
    """Whether prompts describe the tools; not for a policy that was taught them, whose prompts are shorter then."""
    max_turns: int = 32
    """Replies of one episode, those that call tools included."""
    max_tokens: Optional[int] = None
    """Tokens sampled in one episode; null leaves it to ``sampling.max_tokens``, which bounds each reply."""
    max_seconds: float = 1800.0
    """Seconds of one episode; a reply that is being generated then is cut off, a tool that is at work is waited for."""
    max_tool_errors: Optional[int] = None
    """Results that were errors, calls that could not be read included; null does not count them."""
    max_result: int = 16_000
    """Characters of one result; what is longer loses its middle."""
    tool_timeout_s: float = 180.0
    """Seconds after which a tool that has not answered has cost its episode, for each call of the reply; environments
    have shorter limits of their own, whose passing the policy reads as a result."""
    concurrency: int = 64
    """Episodes of this domain with an open environment at the same time; others wait for a place."""
    context: ContextStrategy = ContextStrategy.none
    """What becomes of an episode whose context is nearly full: it ends (``none``), goes on from a summary of its own,
    or from the task with the first 75 % or all of its calls and results discarded."""
    context_threshold: float = 0.8
    """The share of ``model.max_context`` from which the context counts as nearly full."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of task. One entry is a specialist, several are mixed RL in one stage."""

    weight: float = 1.0
    """Share of prompts, relative to the other domains."""
    prompts: Any = MISSING
    """A JSONL or Parquet file, or ``{reasoning_gym: chain_sum, size: 10000, seed: 0, args: {...}}``."""
    eval_prompts: Any = None
    """Prompts for evaluation, in the same form; by default they are held out of ``prompts``."""
    thinking: bool = True
    """Whether the reply starts inside ``<think>``."""
    system: Optional[str] = None
    """System message put before every prompt of this domain."""
    prompt_style: PromptStyle = PromptStyle.none
    """A ready-made system message for a cold start: to reason first, to use tools, or to use them while thinking."""
    environment: Optional[EnvironmentUse] = None
    """Tools that replies may call; null for a domain of single replies."""
    group_size: int = 16
    kl_beta: float = 0.0
    """Strength of the KL to the reference model; 0 for every domain means that no reference model is loaded."""
    advantage_scale: float = 1.0
    """Factor of this domain's advantages, against those of other domains; its KL is not scaled."""
    rewards: list[RewardUse] = field(default_factory=list)
    """The first one decides ``accuracy/<domain>``: the share of samples on which it reaches 1."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where the policy comes from: ``path`` (a Hugging Face directory) or ``init`` (a model with random weights)."""

    path: Optional[str] = None
    init: Optional[dict[str, Any]] = None
    """config.json keys of a model that starts from random weights with the byte tokenizer; ``model_type`` names an
    architecture of transformers, such as qwen3 or qwen3_moe, and is deepseek_v32 by default."""
    dtype: str = "float32"
    max_context: int = 4096
    """Tokens of prompt and reply together."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, in this order: temperature, min-p, top-k, top-p. Engine and learner both read it."""

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    max_tokens: int = 1024


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The engines: which kind, how many, and how far they may run ahead of the learner."""

    engine: EngineKind = EngineKind.torch
    engines: int = 1
    tensor_parallel: int = 1
    """GPUs of one vLLM engine, all on one node."""
    expert_parallel: bool = False
    """Whether an engine's GPUs divide the experts of a layer among them, instead of cutting every expert."""
    max_num_seqs: int = 64
    """Sequences an engine generates at the same time."""
    max_staleness: int = 1
    """Oldest policy a trained token may come from, in weight versions; 0 is strictly on-policy lock-step."""
    threads: int = 1
    """CPU threads of one torch engine."""
    gpu_memory: float = 0.85
    """Share of each of its GPUs that a vLLM engine takes, weights and cache together; less where the learner is too."""
    sleep: bool = True
    """Whether engines give their memory to the learner while that steps, where ``placement`` is ``shared``."""
    cuda_graphs: bool = True
    """Whether vLLM captures CUDA graphs: it starts slower and decodes faster."""
    dsa: Dsa = Dsa.vllm
    """Whose indexer and sparse attention a deepseek_v32 model uses in vLLM: vLLM's, whose fp8 selection the learner
    then imitates, or Keel's, which selects as the learner does; other models attend as ever."""
    batch_invariant: bool = False
    """Whether the model's bits are the same in any company, by vLLM's batch-invariant mode, which is slower; where
    ``sampling.top_p`` cuts still varies. A sparse model needs ``dsa: keel``."""

    @property
    def selects_as_vllm(self) -> bool:
        """Whether a sparse model's engines select keys in vLLM's arithmetic, which is not the learner's own."""
        return self.engine == EngineKind.vllm and self.dsa == Dsa.vllm


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The GRPO objective of the design page and its four stabilisers (the KL's strength is per domain)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    off_policy_delta: Optional[float] = 0.1
    """Nats per token above which a sample with negative advantage is masked; null turns the mask off."""
    keep_routing: bool = True
    keep_sampling_mask: bool = True
    keep_selection: bool = False
    """Whether the learner attends to the keys that the engine's sparse attention selected (docs/engines.md)."""
    aggregation: Aggregation = Aggregation.sequence_mean
    divide_by_std: bool = False
    zero_variance: ZeroVariance = ZeroVariance.keep
    """What becomes of a group without reward variance: trained as it is (its advantages are 0) or replaced."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The learner: its ranks, how their state is sharded, and the optimizer of RL."""

    ranks: int = 1
    zero_stage: int = 2
    expert_parallel: int = 1
    """Ranks that share a layer's routed experts: each keeps its part whole, and tokens travel to their experts."""
    activation_checkpointing: bool = False
    """Keeps only the input of every layer for the backward pass and computes the rest again, which takes about a third
    more arithmetic and far less memory. ZeRO stage 3 needs it to let go of gathered parameters in between."""
    offload_optimizer: Offload = Offload.none
    """``cpu`` keeps fp32 weights and optimizer state in host memory and updates them there."""
    offload_parameters: Offload = Offload.none
    """``cpu`` keeps the parameters in host memory too, and brings those of one layer at a time (ZeRO stage 3)."""
    sleep: bool = False
    """Moves fp32 weights and optimizer state to host memory while the engines generate."""
    micro_tokens: int = 16384
    """Upper bound on the tokens of one packed micro-batch (a longer sample gets one of its own)."""
    minibatches: int = 1
    """Optimizer steps per rollout batch."""
    lr: float = 1.0e-6
    warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises to ``lr``."""
    lr_decay: bool = False
    """Lets the learning rate fall linearly to 0 over the run, instead of keeping it."""
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0
    indexer: IndexerTraining = IndexerTraining.frozen
    """``kl`` trains the lightning indexer on its own KL loss (paper Eq. 4) beside the policy."""
    indexer_weight: float = 1.0
    max_skipped_steps: int = 3
    """Consecutive steps with a non-finite loss or gradient that are skipped before the run stops."""
    threads: int = 1
    """CPU threads of one rank."""


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """A cold start: next-token training on demonstrations before RL."""

    steps: int = 0
    demonstrations: Any = None
    """A JSONL or Parquet file of ``{messages: [...]}`` ending in an assistant message, or a function that writes the
    reply to one prompt: ``{function: package.module:name, size: N, args: {...}}``."""
    batch_size: int = 64
    lr: float = 1.0e-3
    warmup_steps: int = 20
    lr_decay: bool = False
    weight_decay: float = 0.0
    indexer: IndexerTraining = IndexerTraining.kl
    dense_warmup_steps: int = 0
    """First steps with dense attention in which only the indexer learns (paper Eq. 3)."""
    threads: Optional[int] = None
    """CPU threads of one rank in this stage, while the engines have nothing to do; null keeps ``learner.threads``."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out prompts, and how often they are tried."""

    every: int = 0
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    num_prompts: int = 0
    """Prompts per domain; 0 means no evaluation."""
    samples_per_prompt: int = 1


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Engine and learner compared on a fixed set of prompts and seeds, both with the same weights (`rl/canary.py`)."""

    every: int = 10
    """Steps from one comparison to the next, beginning with step 1; 0 never compares."""
    prompts: int = 4
    """Training prompts that are answered for it, of all domains in turn."""
    max_tokens: int = 32
    """Tokens of each reply, at most."""


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """Limits on what a run measures of itself; null turns an alarm off. Each one is explained in docs/alarms.md.

    What is compared with a limit is the mean of the last ``window`` steps. The beginning is the first ``window`` steps.
    """

    window: int = 10
    mismatch: Optional[float] = 0.05
    """Most nats a token by which engine and learner may differ in one comparison on the canary prompts."""
    replay: Optional[float] = 0.02
    """Most that ``routes/replayed`` or ``kept/share`` may lose against the beginning."""
    kept: Optional[float] = 5.0
    """Factor by which the mean kept set may grow or shrink against the beginning."""
    entropy: Optional[float] = 0.1
    """Least share of the beginning's entropy, while accuracy is below 0.9."""
    masked: Optional[float] = 0.5
    """Largest share of samples that the off-policy mask takes out."""
    clipped: Optional[float] = 0.3
    """Largest share of tokens whose gradient the clip cuts off."""
    saturation: Optional[float] = 0.995
    """Accuracy of a domain above which its prompts teach nothing more."""
    zero_variance: Optional[float] = 0.9
    """Largest share of groups whose samples all have the same reward, while accuracy is below 0.9."""
    dominance: Optional[float] = 0.9
    """Largest share of what tells siblings of a domain apart that may come from one reward other than the first."""
    length: Optional[float] = 3.0
    """Factor by which replies may have become longer than five windows before, or than in the beginning."""
    truncated: Optional[float] = 0.75
    """Largest share of replies that a length limit cuts off."""
    stop: list[Alarm] = field(default_factory=list)
    """Alarms that stop the run when they start; the others are told and counted."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases, beside ``metrics.jsonl`` and TensorBoard. Needs the package ``wandb``; the key is its own."""

    project: Optional[str] = None
    """Where metrics and the recipe go; null sends nothing."""
    entity: Optional[str] = None
    group: Optional[str] = None
    tags: list[str] = field(default_factory=list)
    mode: Optional[WandbMode] = None
    """``offline`` writes to the run's directory, for ``wandb sync``; null leaves it to ``WANDB_MODE``."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The generative reward model that ``rubric`` and the proof rewards ask: an endpoint (``url``) or a model that the
    run serves itself (``path``, or ``init`` to try a recipe out)."""

    url: Optional[str] = None
    """Base of an OpenAI-compatible endpoint, such as ``http://judge:8000/v1``."""
    model: Optional[str] = None
    """The model's name at ``url``."""
    api_key: Optional[str] = None
    """Name of the environment variable that holds the endpoint's key."""
    structured: bool = True
    """Whether verdicts must follow their JSON schema; turn it off for an endpoint that refuses ``response_format``."""
    path: Optional[str] = None
    """A Hugging Face directory, served by engines of its own."""
    init: Optional[dict[str, Any]] = None
    """config.json keys of a judge with random weights, to try a recipe out: its verdicts are well-formed and random."""
    engine: EngineKind = EngineKind.torch
    engines: int = 1
    tensor_parallel: int = 1
    dtype: str = "bfloat16"
    max_context: int = 16384
    max_num_seqs: int = 64
    threads: int = 1
    """CPU threads of one torch engine."""
    thinking: bool = False
    """Whether the model served from ``path`` thinks before its verdict."""
    temperature: float = 1.0
    max_tokens: int = 2048
    """Tokens of one verdict, thought included."""
    timeout_s: float = 120.0
    """Seconds that one call may take."""
    attempts: int = 3
    """Calls that are made before a judge that cannot be reached fails the sample."""
    concurrency: int = 64
    """Calls that each worker process may have open."""
    usd_per_million_input: float = 0.0
    """Price of a million tokens read, for the metric ``judge_usd``."""
    usd_per_million_output: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When a run saves itself, and what it keeps."""

    every: int = 20
    """Steps between resumable checkpoints; 0 writes one after the last step only. Before the first step, and when the
    run is interrupted, there is one in any case."""
    cold_start_every: int = 100
    """The same of the cold start, in its own, much shorter steps; 0 saves it when it is interrupted only. These
    checkpoints go when the cold start is over."""
    keep: int = 2
    """The latest so many stay."""
    best: Optional[str] = None
    """Name of a metric, such as ``eval/math``: the checkpoint of the step where it was highest stays as well."""
    grace_s: float = 25.0
    """Seconds that a run which is interrupted (Ctrl-C, SIGTERM) may take to end its step and save itself."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What a run recovers from by itself, and how often, before it stops."""

    engine_restarts: int = 3
    """Restarts of one engine within ``window_s``, or without a request that it finished in between. After the last one
    the run goes on without that engine, and stops when none is left."""
    window_s: float = 3600.0
    """Seconds after which a fault no longer counts, if there was progress since."""
    restart_s: float = 1200.0
    """Seconds that a restart may take, the wait for room on the cluster and loading the model included."""
    learner_restores: int = 3
    """How often a run whose learner died, fell silent or failed goes on from a checkpoint by itself: within
    ``window_s``, or from one and the same checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """When a phase of the run counts as late, by what it took before, and what happens then."""

    act: DoctorAct = DoctorAct.recover
    """``warn`` says who waits for whom and goes on waiting; ``recover`` then ends the process that is late, so that it
    is started again where it can be, and stops the run where not; ``stop`` stops it in every case; ``none`` looks away.
    """
    factor: float = 5.0
    """A phase is late when it takes this many times the longest time it has taken so far,"""
    floor_s: float = 120.0
    """but not before this many seconds,"""
    first_s: float = 1800.0
    """nor, while it has never ended before, before this many."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str = MISSING
    """The run's directory is ``<runs>/<name>``."""
    runs: str = "runs"
    resume: str = RESUME_AUTO
    """What becomes of a run that the directory already holds: ``auto`` goes on with it unless it is finished, ``never``
    refuses. Or a path: another run's directory or checkpoint that this one starts from, or an earlier one of its own;
    once the run has begun there, that means ``auto``.
    """
    seed: int = 0
    steps: int = 100
    prompts_per_step: int = 32
    """Groups the learner trains on in one step, over all domains."""
    model: Model = field(default_factory=Model)
    domains: dict[str, Domain] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    rollout: Rollout = field(default_factory=Rollout)
    placement: Placement = Placement.split
    """``split`` gives every learner rank and every vLLM engine GPUs of its own, and generation overlaps with learning.
    ``shared`` gives the same GPUs to both: each engine has those of as many ranks as it has GPUs, in turn with them."""
    objective: Objective = field(default_factory=Objective)
    learner: Learner = field(default_factory=Learner)
    supervised: Supervised = field(default_factory=Supervised)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    faults: Faults = field(default_factory=Faults)
    doctor: Doctor = field(default_factory=Doctor)
    canary: Canary = field(default_factory=Canary)
    alarms: Alarms = field(default_factory=Alarms)
    wandb: Wandb = field(default_factory=Wandb)
    log_samples: int = 16
    """Trajectories written to ``samples/`` each step."""
    judge: Judge = field(default_factory=Judge)
    reward_env: list[str] = field(default_factory=list)
    """Environment variables that rewards and tools in processes of their own may read, beside those that say where
    programs and libraries are."""
    reward_workers: int = 1
