"""Configs: pydantic models <-> YAML <-> command line."""

from latentpipe.config.base import Optimization as Optimization
from latentpipe.config.base import PictureData as PictureData
from latentpipe.config.base import Run as Run
from latentpipe.config.base import Strict as Strict
from latentpipe.config.base import dump as dump
from latentpipe.config.base import load as load
from latentpipe.config.base import parse as parse
from latentpipe.config.denoiser import CacheData as CacheData
from latentpipe.config.denoiser import Diffusion as Diffusion
from latentpipe.config.denoiser import TextShape as TextShape
from latentpipe.config.denoiser import TrainDenoiser as TrainDenoiser
from latentpipe.config.denoiser import UNetShape as UNetShape
from latentpipe.config.lora import AdapterShape as AdapterShape
from latentpipe.config.lora import LoraData as LoraData
from latentpipe.config.lora import LoraLoss as LoraLoss
from latentpipe.config.lora import LoraRun as LoraRun
from latentpipe.config.lora import Prior as Prior
from latentpipe.config.lora import TrainLora as TrainLora
from latentpipe.config.vae import Adversarial as Adversarial
from latentpipe.config.vae import Crops as Crops
from latentpipe.config.vae import Parts as Parts
from latentpipe.config.vae import Predicted as Predicted
from latentpipe.config.vae import TrainVAE as TrainVAE
from latentpipe.config.vae import VAELoss as VAELoss
from latentpipe.config.vae import VAERun as VAERun
from latentpipe.config.vae import VAEShape as VAEShape
