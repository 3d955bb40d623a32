"""What the compiled steps do, as plain values, and what follows from it."""

import dataclasses

from clsl_jax.data import transforms


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What the train step and the end of an epoch do, as plain values.

    Attributes mean what the configuration keys of the same names mean (`config.py`); lengths are in
    steps, `total_steps` of the whole schedule. `augment` is what the step itself does to the
    images, on the device; the teacher then sees them as they came if `clean_view`.
    """

    steps_per_epoch: int
    total_steps: int = 0
    loss_name: str = "asl"
    gamma_pos: float = 0.0
    gamma_neg: float = 2.0
    clip: float = 0.0
    eps: float = 1e-5
    scale: str = "balanced"
    margin: float = 1.0
    smoothing: float = 0.0
    global_weight: float = 1.0
    expected_positives: float = 0.0
    positives_per_image: float = 0.0
    recovery_mode: str = "epoch"
    recovery_weight: float = 0.8
    ramp_steps: int = 0
    sharpening: str = "safe"
    assumed: float = 0.0
    assumed_weight: float = 1.0
    open_weight: float = 0.0
    correction: str = "none"
    correction_threshold: float = 0.6
    correction_rate: float = 0.002
    estimate_rate: float = 1.0
    blend_share: float = 0.5
    source: str = "scores"
    components: int = 12
    teacher: str = "ema"
    branch: str = "semantic"
    momentum: float = 0.8
    thresholds: str = "fixed"
    calibration: str = "known"
    positive_threshold: float = 0.5
    negative_threshold: float = 0.5
    positive_precision: float = 0.9
    negative_precision: float = 0.985
    min_count: int = 5
    min_known: int = 1
    positive_coverage: float = 0.5
    negative_coverage: float = 0.0
    soft: bool = True
    confidence_power: float = 1.0
    warmup_steps: int = 0
    graph_layers: int = 0
    graph_threshold: float = 0.4
    graph_smoothing: float = 0.25
    graph_refresh: bool = True
    ema_decay: float = 0.9983
    evaluate_ema: bool = True
    accumulate: int = 1
    augment: transforms.Augment | None = None
    clean_view: bool = True
    skip_nonfinite: int = 0
    evaluate_statistics: bool = False
    loss_statistics: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether the state keeps the statistics of the known labels."""
        asked = self.evaluate_statistics or self.loss_statistics
        return asked or (self.recovery_mode == "epoch" and self.source in ("statistics", "both"))

    @property
    def keeps_prototypes(self) -> bool:
        """Whether each class's known positives are averaged."""
        recovers = self.recovery_mode == "epoch" and self.source == "prototypes"
        return recovers or self.recovery_mode == "blend"

    @property
    def hands_out_others(self) -> bool:
        """Whether other labels are handed out than learned from, by adaptive thresholds."""
        return self.recovery_mode == "epoch" and self.thresholds in ("none", "matched")

    @property
    def handing_out(self) -> "StepOptions":
        """The same as labels are handed out, to whoever asks for them: these if they are learned.

        Others are hard ones beyond adaptive thresholds, of what predictions are made of.
        """
        if not self.hands_out_others:
            return self
        informed = self.evaluate_statistics and self.source == "scores"
        source = "both" if informed else self.source
        return dataclasses.replace(self, thresholds="adaptive", soft=False, source=source)

    @property
    def teaches(self) -> bool:
        """Whether labels are recovered into the matrix."""
        return self.recovery_mode in ("epoch", "estimate")

    @property
    def keeps_scores(self) -> bool:
        """Whether each step scatters scores into the matrix."""
        from_scores = self.source in ("scores", "both", "prototypes")
        return self.recovery_mode == "estimate" or (self.recovery_mode == "epoch" and from_scores)
