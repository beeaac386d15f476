"""What ``kdpo-compare`` is told: every key, its type, its default and what it means. Hydra refuses any other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

PROTOCOLS = ("sequence", "single")
SPLITS = ("test", "validation", "all")


@dataclass
class Method:
    """Which method edits."""

    name: str = MISSING
    """As in ``method=...`` and in results."""
    label: str = MISSING
    """As in tables."""
    hparams: dict[str, Any] | None = MISSING
    """The method's settings: ``hparams/<METHOD>/<model>.yaml``. For a model without a file it is ``auto.yaml`` there,
    filled from the model's structure (:mod:`~.derived_settings`). ``null`` edits nothing."""
    apply: str = ""
    """``package.module:function``: an editor that EasyEdit lacks, with the interface of EasyEdit's
    (:mod:`~.outside`)."""
    settings_class: str = ""
    """Likewise, the class that its settings are made into; without one they are attributes of an object."""
    rate_factor: float = 1.0
    """Multiplies the method's learning rate (``lr``, ``v_lr`` or ``edit_lr``): the paper takes a fifth of KDPO's for
    edits in a sequence."""
    trials: int | None = None
    """Settings that were tried for it before these were chosen, as tables say beside its figures; ``null`` is not said.
    No figure depends on it."""
    requests_per_call: int = 1
    """Edits handed to the method at a time, in a sequence; for those that edit several together."""
    without: str = ""
    """Where the installed form of EasyEdit lacks the method: "" skips it; "ce" makes it with this package's own
    cross-entropy objective, in the same layer, with the same rate and number of steps; a folder of ``hparams/`` takes
    the settings there instead."""


@dataclass
class Model:
    """What is edited."""

    name: str = MISSING
    """Hugging Face id, folder, ``.gguf`` file, or a name of this package's: smollm2-135m, kdpo-llama-knowedit, ..."""
    settings: str = ""
    """The name of its files in the folders of ``hparams/``; where there is none, settings are derived."""
    dtype: str = "float32"
    """float32, bfloat16, float16, or auto (as saved)."""
    device: str | None = None
    """cpu, cuda, cuda:1, auto (spread over all GPUs); null is the GPU where there is one."""
    text: str | None = None
    """A file (plain, .xz, .gz, .bz2) to compute second moments from when MEMIT or AlphaEdit lack them; "general" is the
    text that comes with the package, "shipped" what the shipped model knows."""
    characters: int = 20_000_000
    """Of that text, at most."""
    tokens_per_input: int | None = None
    """Tokens of that text, from documents drawn from all of it, for each input of the edited matrix, at most; ``null``
    takes it all."""
    held_out_text: str | None = None
    """Text for the perplexity, likewise; null is a piece of the Simple English Wikipedia, in the package."""
    stops: bool = False
    """It says the answer and no more, as the shipped model was taught to; others go on talking."""


@dataclass
class Dataset:
    """Which facts."""

    name: str = MISSING
    """As in results."""
    source: str = MISSING
    """"shipped", a name of :data:`~.datasets.KNOWN`, ``hub:<owner/name>:<file>``, or a local file, whatever its
    name. A ``hub:`` source with a comma or an equals sign stands in double quotes of its own."""
    offset: int = 0
    """Records of the seeded order to leave out at the start."""
    split: str = "test"
    """"validation": the records of a fifth of the subjects, for tuning; "test": of the others; "all"."""
    validation: str | None = None
    """A source of its own for the validation split; the test split is then all of ``source``."""
    known: str = "counterfact"
    """The source of facts that the model is asked before and after: records with their old answers."""
    probabilities: bool = False
    """The records are CounterFact's: their neighbours share the old answer."""
    unique_subjects: bool = True
    """Keep the first record of each subject only. Otherwise a later edit may overwrite an earlier one."""
    shuffle: bool = True
    drop_bad: bool = False
    """Leave bad records out instead of stopping at the first."""


@dataclass
class Protocol:
    """How edits are made and scored."""

    name: str = MISSING
    """"sequence": one after the other, all kept. "single": each alone, undone before the next."""
    eval_at: list[int] = field(default_factory=lambda: [1, 10, 100, 500])
    """Numbers of edits after which all of them are scored (in a sequence); the last is always scored."""
    right_after: bool = True
    """In a sequence, score each edit also right after it was made, as EasyEdit does."""
    known: int = 200
    """Facts about other subjects that the model answers right before any edit, at most, to be asked again at every
    ``eval_at``; 0 leaves them out."""
    other_questions: int = 0
    """Other questions about each edited subject, at most, asked before any edit and at every ``eval_at``
    (:mod:`~.other_questions`)."""
    stops: bool = II("model.stops")
    """Measure also whether answers are complete and stopped (``*_gen_stop``)."""
    longest: int = 0
    """Tokens generated at most for an answer; 0 is the longest target's length and eight more."""
    fluency: int = 0
    """Tokens generated per edit for the n-gram entropy; 0 leaves fluency out. EasyEdit takes 100."""
    probabilities: bool = II("dataset.probabilities")
    """CounterFact's own scores, by the probability of new and old answer (:mod:`~.counterfact`)."""
    wild: bool = False
    """Before any edit and at every ``eval_at``, ask the question alone, in an instruction and as a chat
    (:mod:`~.wild`)."""
    judge: str | None = None
    """Address of a server of chat completions, ``http://localhost:8000/v1`` say, that judges those answers. Its key is
    read from the environment variable OPENAI_API_KEY."""
    judge_model: str = ""
    """The model to ask there."""
    perplexity: bool = True
    """Of held-out text, and the next tokens' agreement with the unedited model's, at every ``eval_at``."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, by name or by their files' paths, before any edit and at every ``eval_at``
    (:mod:`~.harness`)."""
    tasks_limit: int | None = None
    """Examples of each task at most; ``null`` takes all."""
    batch_size: int = 256
    """Prompts scored at once, at most."""


@dataclass
class Compare:
    """One cell of a comparison."""

    method: Method = MISSING
    model: Model = MISSING
    dataset: Dataset = MISSING
    protocol: Protocol = MISSING
    n_edits: int = 100
    seed: int = 0
    """Of the records' order and of everything random in a method."""
    out: str = "results"
    """Folder of results; one folder per cell in it."""
    cache: str = MISSING
    """Folder for what can be made again: outputs before any edit, statistics."""
    stats_dir: str | None = None
    """Where second moments for MEMIT and AlphaEdit are kept (EasyEdit's ``stats_dir``); null is in ``cache``, apart for
    each model's weights."""
    overwrite: bool = False
    """Compute again what is complete, failed or damaged."""
    threads: int | None = None
    """CPU threads of torch; null leaves its own choice."""
    logging: str | None = None
    """Send the means of each checkpoint to trackio, wandb or tensorboard, too; null sends them nowhere."""
    report: bool = True
    """Print the table of ``out`` at the end and draw its figures."""
