"""The loop and its consumer. Knows no ray, no mlflow."""

from vinedresser.train.fit import AveragedWeights, Effects, Window, evaluation_steps, fit
from vinedresser.train.place import Place, has_bf16, place, seed_step
from vinedresser.train.progress import Best, Progress, Tell, Teller, untold
from vinedresser.train.steps import Step, Trainee, training_steps
from vinedresser.train.watch import JUDGING, STORING, Clock, Pace

__all__ = [
    "JUDGING",
    "STORING",
    "AveragedWeights",
    "Best",
    "Clock",
    "Effects",
    "Pace",
    "Place",
    "Progress",
    "Step",
    "Tell",
    "Teller",
    "Trainee",
    "Window",
    "evaluation_steps",
    "fit",
    "has_bf16",
    "place",
    "seed_step",
    "training_steps",
    "untold",
]
