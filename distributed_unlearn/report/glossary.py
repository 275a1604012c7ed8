"""The words of a report, each in a sentence or two for a reader who is no specialist."""

GLOSSARY: tuple[tuple[str, str], ...] = (
    ("forget set", "The records that somebody asked to be forgotten."),
    ("retain set", "The training records that stay: what the model should go on knowing."),
    ("holdout set", "Records that the model was never trained on: they show how hard unseen data is for it."),
    (
        "retrained model",
        "The reference: a model trained from the same start without the forgotten records. Unlearning tries to reach "
        "it at a small part of its cost.",
    ),
    (
        "loss, nats per token",
        "How surprised the model is by the true answer, averaged over its tokens: minus the natural logarithm of the "
        "probability that it gives each one. 0 is certain; 2.3 nats is a probability of one tenth.",
    ),
    (
        "memorised",
        "The share of answer tokens that the model ranks first when it is given all of the answer before them.",
    ),
    (
        "Tug-of-War (ToW)",
        "Closeness to the retrained model: over the three sets, the product of 1 minus the difference in the share "
        "memorised (Zhao et al. 2024). 1 is indistinguishable.",
    ),
    ("product", "One product of the loss's curvature with a vector: the unit of cost of a second-order step."),
    ("alpha", "The length of a step, which the cubic model determines together with the step itself."),
    ("gamma", "The damping M alpha / 2 that this amounts to: what other methods must be told in advance."),
    (
        "M",
        "The cubic coefficient: how fast the curvature may change. It is raised when a step turns out worse than "
        "predicted and lowered when it turns out well.",
    ),
    ("accepted, rejected", "A step is kept when it reduces the objective enough; else the weights are put back."),
)
