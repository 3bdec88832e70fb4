"""Residual state: what compression left out, kept until it is sent.

Source: Seide et al., "1-Bit Stochastic Gradient Descent" (Interspeech 2014); Karimireddy et al., "Error
Feedback Fixes SignSGD and other Gradient Compression Schemes" (ICML 2019); the server residual is that
of Tang et al., "DoubleSqueeze" (ICML 2019) and "1-bit Adam" (ICML 2021).
"""

from gck.error_feedback.bindings import ServerBinding, ShardBinding
from gck.error_feedback.checks import STATE_VERSION, check_factor, check_version, checked_residual, is_finite
from gck.error_feedback.map import ErrorFeedbackMap
from gck.error_feedback.scaling import check_scaled, multiply_
from gck.error_feedback.state import ErrorFeedback, Snapshot

__all__ = [
    "STATE_VERSION",
    "ErrorFeedback",
    "ErrorFeedbackMap",
    "ServerBinding",
    "ShardBinding",
    "Snapshot",
    "check_factor",
    "check_scaled",
    "check_version",
    "checked_residual",
    "is_finite",
    "multiply_",
]
