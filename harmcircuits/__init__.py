"""Find, mask and measure the weights behind harmful generation: a model-editing extension for TransformerLens."""

from harmcircuits.behaviours.files import Texts
from harmcircuits.behaviours.generation import Sampling, greedy_answers, sampled_answers
from harmcircuits.behaviours.judges import EndpointJudge, LocalJudge, StrongReject, named_judge
from harmcircuits.behaviours.model import Behaviour, Subject, calibrate, calibrate_shown, measure
from harmcircuits.behaviours.questions import Wording
from harmcircuits.circuits.location import concentration, counts_by
from harmcircuits.circuits.masks import WeightMask, random_like, top_fraction, top_fractions
from harmcircuits.circuits.overlap import Overlap, marginal_null, overlap, overlap_by, rank_correlation
from harmcircuits.circuits.scores import WeightScores, mean_scores
from harmcircuits.export import export
from harmcircuits.hooks.attacks import refusal_ablation
from harmcircuits.hooks.attribution import (
    activation_norm,
    gradient_norm,
    magnitude_scores,
    random_scores,
    removal_effect,
    sensitivity,
    token_contributions,
)
from harmcircuits.hooks.finetuning import FineTuning, Lora, fine_tuning
from harmcircuits.hooks.losses import completion_nll, kl_under, perplexity, predicted_change
from harmcircuits.hooks.masking import held, masked
from harmcircuits.hooks.memory import estimate_memory
from harmcircuits.hooks.objectives import choice_margin, completion_loss
from harmcircuits.hooks.search import best_unprotected, circuit_mask, circuit_path
from harmcircuits.hooks.weights import named_weights, weight_sites
from harmcircuits.measurements import Measurement, read_rows
from harmcircuits.organisms import load_organism, organism_behaviours, organism_subject, planted_circuit
from harmcircuits.prompts import Batch, Example, PromptSet, tokenize, tokenize_text
from harmcircuits.studies.dissociation import dissociation
from harmcircuits.studies.models import SubjectSpec, load_model
from harmcircuits.studies.study import Settings, run_study
from harmcircuits.studies.utility import evaluate_tasks

__all__ = [
    "Batch",
    "Behaviour",
    "EndpointJudge",
    "Example",
    "FineTuning",
    "LocalJudge",
    "Lora",
    "Measurement",
    "Overlap",
    "PromptSet",
    "Sampling",
    "Settings",
    "StrongReject",
    "Subject",
    "SubjectSpec",
    "Texts",
    "WeightMask",
    "WeightScores",
    "Wording",
    "activation_norm",
    "best_unprotected",
    "calibrate",
    "calibrate_shown",
    "choice_margin",
    "circuit_mask",
    "circuit_path",
    "completion_loss",
    "completion_nll",
    "concentration",
    "counts_by",
    "dissociation",
    "estimate_memory",
    "evaluate_tasks",
    "export",
    "fine_tuning",
    "gradient_norm",
    "greedy_answers",
    "held",
    "kl_under",
    "load_model",
    "load_organism",
    "magnitude_scores",
    "marginal_null",
    "masked",
    "mean_scores",
    "measure",
    "named_judge",
    "named_weights",
    "organism_behaviours",
    "organism_subject",
    "overlap",
    "overlap_by",
    "perplexity",
    "planted_circuit",
    "predicted_change",
    "random_like",
    "random_scores",
    "rank_correlation",
    "read_rows",
    "refusal_ablation",
    "removal_effect",
    "run_study",
    "sampled_answers",
    "sensitivity",
    "token_contributions",
    "tokenize",
    "tokenize_text",
    "top_fraction",
    "top_fractions",
    "weight_sites",
]
