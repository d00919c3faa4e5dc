"""Registers the drafters that come with folospec, one file each.

Importing this package registers them.
"""

from folospec.spec.drafters.base import register_drafter
from folospec.spec.drafters.draft_model import DraftModelDrafter
from folospec.spec.drafters.layer_skip import LayerSkipDrafter
from folospec.spec.drafters.lookahead import LookaheadDrafter
from folospec.spec.drafters.nasd import NasdDrafter
from folospec.spec.drafters.ngram import NgramDrafter
from folospec.spec.drafters.ouroboros import OuroborosDrafter
from folospec.spec.drafters.prediction import PredictionDrafter
from folospec.spec.drafters.quantized import QuantizedDrafter
from folospec.spec.drafters.suffix import SuffixDrafter
from folospec.spec.drafters.token_recycling import TokenRecyclingDrafter

register_drafter("ngram", NgramDrafter)
register_drafter("nasd", NasdDrafter)
register_drafter("lookahead", LookaheadDrafter)
register_drafter("token_recycling", TokenRecyclingDrafter)
register_drafter("draft_model", DraftModelDrafter)
register_drafter("ouroboros", OuroborosDrafter)
register_drafter("quantized", QuantizedDrafter)
register_drafter("layer_skip", LayerSkipDrafter)
register_drafter("suffix", SuffixDrafter)
register_drafter("prediction", PredictionDrafter)
