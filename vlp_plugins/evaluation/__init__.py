"""Task metrics: retrieval, captioning, question answering, classification."""

from __future__ import annotations

from vlp_plugins.evaluation.answer_words import normal_answer
from vlp_plugins.evaluation.answering import VqaAccuracy, answer_questions, vqa_accuracy
from vlp_plugins.evaluation.caption_metrics import CaptionScores, caption_scores
from vlp_plugins.evaluation.captioning import write_captions
from vlp_plugins.evaluation.classification import Accuracy, classification
from vlp_plugins.evaluation.recall import Recall, recall_at_k
from vlp_plugins.evaluation.retrieval import TwoStages, retrieval, two_stage_retrieval

__all__ = [
    "Accuracy",
    "CaptionScores",
    "Recall",
    "TwoStages",
    "VqaAccuracy",
    "answer_questions",
    "caption_scores",
    "classification",
    "normal_answer",
    "recall_at_k",
    "retrieval",
    "two_stage_retrieval",
    "vqa_accuracy",
    "write_captions",
]
