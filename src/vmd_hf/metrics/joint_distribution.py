"""Samples of digits against a joint distribution that is known."""

import datasets
import evaluate
import torch

from vmd_hf.data.synthetic import joint_metrics, target_distribution
from vmd_hf.metrics import PAPER_CITATION

_DESCRIPTION = """Accuracy (share of samples in the support) and KL(target || samples) in nats over the support, of
samples of two or four digits against one of the synthetic joint distributions of arXiv 2510.23606. A point of the
support that was never sampled counts as half a sample."""

_KWARGS_DESCRIPTION = """
Args:
    predictions: list of lists of two or four token ids, 0 to 9 for digits.
    setting: "d1", "d2", "two_token_deterministic", "two_token_nonuniform" or "two_token_correlated".
    correlation: p of "two_token_correlated".
Returns:
    accuracy, accuracy_standard_error, kl, kl_floor (what as many perfect samples would give), num_samples.
Examples:
    >>> metric = vmd_hf.metrics.load("joint_distribution")
    >>> metric.compute(predictions=[[0, 1], [3, 4]], setting="two_token_deterministic")["accuracy"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class JointDistribution(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=PAPER_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions, setting: str, correlation: float | None = None, **kwargs):
        target = target_distribution(setting, correlation)
        lengths = {len(row) for row in predictions}
        if lengths != {target.dim()}:
            raise ValueError(f"predictions must have {target.dim()} tokens each for {setting}, got {sorted(lengths)}")
        return joint_metrics(torch.tensor(predictions), target)
