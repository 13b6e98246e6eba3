"""Find, mask and measure the weights behind harmful generation: a model-editing extension for TransformerLens."""

from harmcircuits.answers import greedy_answers
from harmcircuits.attacks import refusal_ablation
from harmcircuits.attribution import (
    activation_norm,
    gradient_norm,
    magnitude_scores,
    random_scores,
    removal_effect,
    sensitivity,
)
from harmcircuits.behaviours import Behaviour, Subject, calibrate, measure
from harmcircuits.circuits import best_unprotected, circuit_mask, circuit_path
from harmcircuits.hooks.finetuning import FineTuning, Lora, fine_tuning
from harmcircuits.hooks.masking import held, masked
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.masks import WeightMask, random_like, top_fraction
from harmcircuits.metrics import completion_nll, kl_under, predicted_change
from harmcircuits.objectives import completion_loss
from harmcircuits.organisms import load_organism, organism_behaviours, organism_subject, planted_circuit
from harmcircuits.prompts import Batch, Example, PromptSet, tokenize
from harmcircuits.records import Measurement, read_rows
from harmcircuits.scores import WeightScores
from harmcircuits.study import Settings, run_study

__all__ = [
    "Batch",
    "Behaviour",
    "Example",
    "FineTuning",
    "Lora",
    "Measurement",
    "PromptSet",
    "Settings",
    "Subject",
    "WeightMask",
    "WeightScores",
    "activation_norm",
    "best_unprotected",
    "calibrate",
    "circuit_mask",
    "circuit_path",
    "completion_loss",
    "completion_nll",
    "fine_tuning",
    "gradient_norm",
    "greedy_answers",
    "held",
    "kl_under",
    "load_organism",
    "magnitude_scores",
    "masked",
    "measure",
    "named_weights",
    "organism_behaviours",
    "organism_subject",
    "planted_circuit",
    "predicted_change",
    "random_like",
    "random_scores",
    "read_rows",
    "refusal_ablation",
    "removal_effect",
    "run_study",
    "sensitivity",
    "tokenize",
    "top_fraction",
    "weight_sites",
]
