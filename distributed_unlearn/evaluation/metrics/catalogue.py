"""What each metric is called, what it says in one sentence for anybody, and which way is better."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "reference", "zero"]
"""`reference`: as near as possible to the retrained model's value, whatever that is."""


@dataclass(frozen=True)
class MetricDefinition:
    """A metric for readers; its function says how it is computed."""

    name: str
    title: str
    sentence: str
    """For a reader who is no specialist; shown beside every value."""
    better: Better
    unit: str = ""


LOSS = MetricDefinition(
    "loss",
    "loss",
    "How surprised the model is by the true answer, averaged over its tokens; 0 is certain.",
    "reference",
    "nats per token",
)
PROBABILITY = MetricDefinition(
    "probability",
    "answer probability",
    "How likely the model makes the true answer, as the typical probability that it gives each token; 1 is certain.",
    "reference",
)
EXACT_MEMORISATION = MetricDefinition(
    "exact_memorisation",
    "exact memorisation",
    "The share of an answer's tokens that the model ranks first when it is shown all of the answer before them.",
    "reference",
)
EXTRACTION_STRENGTH = MetricDefinition(
    "extraction_strength",
    "extraction strength",
    "How large a last part of the answer the model completes without a mistake once it is shown the part before it.",
    "reference",
)
ROUGE_RECALL = MetricDefinition(
    "rouge_l_recall",
    "ROUGE-L recall",
    "How many of the true answer's words, in their order, turn up when the model answers by itself.",
    "reference",
)
VERBMEM = MetricDefinition(
    "verbmem",
    "verbatim memorisation (VerbMem)",
    "How closely the model's own continuation follows the true text word by word; 1 is the text itself.",
    "reference",
)
KNOWMEM = MetricDefinition(
    "knowmem",
    "knowledge memorisation (KnowMem)",
    "How well the model's short answers to questions about the text match the true ones, after a few examples.",
    "reference",
)
TRUTH_RATIO = MetricDefinition(
    "truth_ratio",
    "truth ratio",
    "Whether the model still prefers the true answer to false ones that sound alike; a model that never saw the "
    "records has the retrained model's value.",
    "reference",
)
KEPT_TRUTH_RATIO = MetricDefinition(
    "truth_ratio",
    "truth ratio",
    "How clearly the model prefers the true answer to false ones that sound alike; 1 is always, 0 is never.",
    "higher",
)
CHOICE_PROBABILITY = MetricDefinition(
    "choice_probability",
    "choice probability",
    "How likely the model makes the true answer among the answers that are offered; 1 is certain.",
    "higher",
)
FORGET_QUALITY = MetricDefinition(
    "forget_quality",
    "forget quality",
    "The chance to see so large a difference between the unlearned and the retrained model's truth ratios if both "
    "treat the forgotten records alike; above 0.05 they cannot be told apart.",
    "higher",
    "p-value",
)
MODEL_UTILITY = MetricDefinition(
    "model_utility",
    "model utility",
    "How useful the model still is on what it should know: nine scores on kept records, real authors and facts of the "
    "world in one number, in which the worst counts most.",
    "higher",
)
MIA_AUC = MetricDefinition(
    "mia_auc",
    "membership inference (AUC)",
    "How well an attacker can tell a record to be forgotten from one that was never seen: 0.5 is guessing, 1 is "
    "always, below 0.5 the forgotten record looks less known than an unseen one.",
    "reference",
)
PRIV_LEAK = MetricDefinition(
    "priv_leak",
    "privacy leak (PrivLeak)",
    "How far an attacker's success is from what it is on the retrained model: 0 is the same, -100 is as if nothing was "
    "forgotten, far above 0 is forgotten so hard that it shows.",
    "zero",
    "%",
)
TUG_OF_WAR = MetricDefinition(
    "tug_of_war",
    "Tug-of-War (ToW)",
    "How close the model is to one retrained without the forgotten records, in what it gets right on all three sets; "
    "1 cannot be told apart.",
    "higher",
)
JENSEN_SHANNON = MetricDefinition(
    "jensen_shannon",
    "divergence to the retrained model (JS)",
    "How differently the two models expect each next token: 0 is the same, 0.693 is nothing in common.",
    "lower",
    "nats",
)
HOLDOUT_DISTANCE = MetricDefinition(
    "holdout_distance",
    "distance to unseen records (KS)",
    "How far apart the losses of forgotten and of never seen records lie: 0 is alike, 1 is without overlap.",
    "lower",
)
DEPTH = MetricDefinition(
    "depth",
    "depth (linear probe)",
    "Whether the forgotten answers can still be read from inside the model by a simple decoder, where its own output "
    "no longer tells them.",
    "reference",
)
CLASS_LOSS = MetricDefinition(
    "loss", "loss", "How surprised the model is by the true class; 0 is certain.", "reference", "nats per record"
)
CLASS_PROBABILITY = MetricDefinition(
    "probability", "class probability", "How likely the model makes the true class; 1 is certain.", "reference"
)
ACCURACY = MetricDefinition(
    "exact_memorisation", "accuracy", "The share of records whose class the model gets right.", "reference"
)
METRICS = (
    LOSS,
    PROBABILITY,
    EXACT_MEMORISATION,
    EXTRACTION_STRENGTH,
    ROUGE_RECALL,
    VERBMEM,
    KNOWMEM,
    TRUTH_RATIO,
    KEPT_TRUTH_RATIO,
    CHOICE_PROBABILITY,
    FORGET_QUALITY,
    MODEL_UTILITY,
    MIA_AUC,
    PRIV_LEAK,
    TUG_OF_WAR,
    JENSEN_SHANNON,
    HOLDOUT_DISTANCE,
    DEPTH,
    CLASS_LOSS,
    CLASS_PROBABILITY,
    ACCURACY,
)
