"""Configs: pydantic models <-> YAML <-> command line."""

from latentpipe.train.config.base import Optimization as Optimization
from latentpipe.train.config.base import PictureData as PictureData
from latentpipe.train.config.base import Run as Run
from latentpipe.train.config.base import Strict as Strict
from latentpipe.train.config.base import dump as dump
from latentpipe.train.config.base import load as load
from latentpipe.train.config.base import parse as parse
from latentpipe.train.config.denoiser import CacheData as CacheData
from latentpipe.train.config.denoiser import Diffusion as Diffusion
from latentpipe.train.config.denoiser import TextShape as TextShape
from latentpipe.train.config.denoiser import TrainDenoiser as TrainDenoiser
from latentpipe.train.config.denoiser import UNetShape as UNetShape
from latentpipe.train.config.lora import AdapterShape as AdapterShape
from latentpipe.train.config.lora import LoraData as LoraData
from latentpipe.train.config.lora import LoraLoss as LoraLoss
from latentpipe.train.config.lora import LoraRun as LoraRun
from latentpipe.train.config.lora import Prior as Prior
from latentpipe.train.config.lora import TrainLora as TrainLora
from latentpipe.train.config.vae import Adversarial as Adversarial
from latentpipe.train.config.vae import Crops as Crops
from latentpipe.train.config.vae import Parts as Parts
from latentpipe.train.config.vae import Predicted as Predicted
from latentpipe.train.config.vae import TrainVAE as TrainVAE
from latentpipe.train.config.vae import VAELoss as VAELoss
from latentpipe.train.config.vae import VAERun as VAERun
from latentpipe.train.config.vae import VAEShape as VAEShape
