"""The families of diffusers' picture pipelines as data: which classes belong together, and how they read their autoencoder.

What can be read from a class or its parts is read (`families.facts`: the denoiser's and the autoencoder's place, packed latents,
resolution bins; `families.expected_latents`: channels, learned variance, mask and control channels). What only the code of a
pipeline says is declared here, and `tests/pipelines/test_family_table.py` compares it with diffusers, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from latentpipe.checkpoints.model_files import STABLE_DIFFUSION

KL = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
DC = ("AutoencoderDC",)
PATCHED = ("AutoencoderKLFlux2",)
TASKS = ("text", "image", "inpaint", "control", "control_image", "control_inpaint")


@dataclass(frozen=True)
class PipelineFamily:
    """A family of diffusers pipelines, which share a denoiser and the space of its latents.

    name        as people say it
    text        class names, "" where there is none: text-to-image; image: img2img; inpaint
    control     the same three with ControlNets: control, control_image, control_inpaint
    more        further classes of the same latents, with tasks of their own (editing, filling, upscaling, adapters)
    shift       its own tail honours shift_factor (and needs one that is not None)
    statistics  its own tail honours latents_mean and latents_std, of four channels
    raw         its denoiser takes the autoencoder's raw values, without a factor
    plain       autoencoder classes whose outputs and config its own code can read
    gives_raw   output_type="latent" gives raw values, or no latents; the pipeline's own call of its autoencoder shows them
    without     for a task that has no class: one sentence why not
    listed      False where nobody has declared it: it is tried by measurement
    source      the class itself, of one that is not listed
    """

    name: str
    text: str
    image: str = ""
    inpaint: str = ""
    control: str = ""
    control_image: str = ""
    control_inpaint: str = ""
    more: tuple[str, ...] = ()
    shift: bool = False
    statistics: bool = False
    raw: bool = False
    gives_raw: bool = False
    plain: tuple[str, ...] = KL
    without: str = "diffusers has no such pipeline of this family"
    listed: bool = True
    source: type | None = field(default=None, compare=False, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of its pipelines."""
        return (*(name for task in TASKS if (name := getattr(self, task))), *self.more)


def _classes(stem: str, *kinds: str) -> dict[str, Any]:
    """Class names by task: a stem, and what stands between it and Pipeline."""
    return {task: f"{stem}{kind}Pipeline" for task, kind in zip(TASKS, kinds, strict=False) if kind != "-"}


FAMILIES = (
    PipelineFamily(
        "Stable Diffusion 1/2",
        *STABLE_DIFFUSION,
        control="StableDiffusionControlNetPipeline",
        control_image="StableDiffusionControlNetImg2ImgPipeline",
        control_inpaint="StableDiffusionControlNetInpaintPipeline",
        more=(
            "StableDiffusionAdapterPipeline",
            "StableDiffusionDepth2ImgPipeline",
            "StableDiffusionImageVariationPipeline",
            "StableDiffusionInstructPix2PixPipeline",
            "StableDiffusionLatentUpscalePipeline",
            "StableDiffusionUpscalePipeline",
            "StableUnCLIPImg2ImgPipeline",
            "StableUnCLIPPipeline",
        ),
    ),
    PipelineFamily(
        "Stable Diffusion XL",
        **_classes("StableDiffusionXL", "", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
        more=(
            "StableDiffusionXLAdapterPipeline",
            "StableDiffusionXLControlNetUnionImg2ImgPipeline",
            "StableDiffusionXLControlNetUnionInpaintPipeline",
            "StableDiffusionXLControlNetUnionPipeline",
            "StableDiffusionXLInstructPix2PixPipeline",
        ),
        statistics=True,
    ),
    PipelineFamily(
        "Stable Diffusion 3",
        **_classes("StableDiffusion3", "", "Img2Img", "Inpaint", "ControlNet", "-", "ControlNetInpainting"),
        shift=True,
    ),
    PipelineFamily(
        "FLUX.1",
        **_classes("Flux", "", "Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint"),
        more=(
            "FluxControlImg2ImgPipeline",
            "FluxControlInpaintPipeline",
            "FluxControlPipeline",
            "FluxFillPipeline",
            "FluxKontextInpaintPipeline",
            "FluxKontextPipeline",
            "VisualClozeGenerationPipeline",
        ),
        shift=True,
    ),
    PipelineFamily("Sana", **_classes("Sana", "", "-", "-", "ControlNet"), plain=DC),
    PipelineFamily("Sana Sprint", **_classes("SanaSprint", "", "Img2Img"), plain=DC),
    PipelineFamily("Sana PAG", "SanaPAGPipeline", plain=DC),
    PipelineFamily(
        "Stable Diffusion 1/2 PAG",
        **_classes("StableDiffusion", "PAG", "PAGImg2Img", "PAGInpaint", "ControlNetPAG", "-", "ControlNetPAGInpaint"),
    ),
    PipelineFamily(
        "Stable Diffusion XL PAG",
        **_classes("StableDiffusionXL", "PAG", "PAGImg2Img", "PAGInpaint", "ControlNetPAG", "ControlNetPAGImg2Img"),
        statistics=True,
    ),
    PipelineFamily("Stable Diffusion 3 PAG", **_classes("StableDiffusion3", "PAG", "PAGImg2Img"), shift=True),
    PipelineFamily("Latent Consistency", **_classes("LatentConsistencyModel", "", "Img2Img")),
    PipelineFamily("Kolors", **_classes("Kolors", "", "Img2Img")),
    PipelineFamily("Kolors PAG", "KolorsPAGPipeline"),
    PipelineFamily("PixArt-alpha", "PixArtAlphaPipeline"),
    PipelineFamily("PixArt-Sigma", "PixArtSigmaPipeline"),
    PipelineFamily("PixArt-Sigma PAG", "PixArtSigmaPAGPipeline"),
    PipelineFamily("HunyuanDiT", **_classes("HunyuanDiT", "", "-", "-", "ControlNet")),
    PipelineFamily("HunyuanDiT PAG", "HunyuanDiTPAGPipeline"),
    PipelineFamily("HunyuanImage 2.1", "HunyuanImagePipeline", plain=("AutoencoderKLHunyuanImage",)),
    PipelineFamily("Lumina", "LuminaPipeline"),
    PipelineFamily("Lumina 2", "Lumina2Pipeline", shift=True),
    PipelineFamily("AuraFlow", "AuraFlowPipeline"),
    PipelineFamily("CogView3-Plus", "CogView3PlusPipeline"),
    PipelineFamily("CogView4", "CogView4Pipeline", more=("CogView4ControlPipeline",)),
    PipelineFamily("Chroma", **_classes("Chroma", "", "Img2Img", "Inpaint"), shift=True),
    PipelineFamily("Bria", "BriaPipeline", shift=True),
    PipelineFamily("Ovis-Image", "OvisImagePipeline", shift=True),
    PipelineFamily("LongCat-Image", "LongCatImagePipeline", more=("LongCatImageEditPipeline",), shift=True),
    PipelineFamily(
        "Z-Image",
        **_classes("ZImage", "", "Img2Img", "Inpaint", "ControlNet", "-", "ControlNetInpaint"),
        more=("ZImageOmniPipeline",),
        shift=True,
    ),
    PipelineFamily("HiDream-I1", "HiDreamImagePipeline", shift=True),
    PipelineFamily("PRX", "PRXPipeline", shift=True, plain=(*KL, *DC)),
    PipelineFamily("OmniGen", "OmniGenPipeline"),
    PipelineFamily("DiT", "DiTPipeline", gives_raw=True),
    PipelineFamily("Kandinsky 5 Image", "Kandinsky5T2IPipeline", more=("Kandinsky5I2IPipeline",), gives_raw=True),
    PipelineFamily(
        "Kandinsky 2.1",
        **_classes("Kandinsky", "", "Img2Img", "Inpaint"),
        raw=True,
        gives_raw=True,
        plain=("VQModel",),
    ),
    PipelineFamily(
        "Kandinsky 2.2",
        **_classes("KandinskyV22", "", "Img2Img", "Inpaint", "Controlnet", "ControlnetImg2Img"),
        raw=True,
        gives_raw=True,
        plain=("VQModel",),
    ),
    PipelineFamily("Kandinsky 3", **_classes("Kandinsky3", "", "Img2Img"), raw=True, gives_raw=True, plain=("VQModel",)),
    PipelineFamily(
        "FLUX.2",
        "Flux2Pipeline",
        plain=PATCHED,
    ),
    PipelineFamily(
        "FLUX.2 klein",
        "Flux2KleinPipeline",
        inpaint="Flux2KleinInpaintPipeline",
        more=("Flux2KleinKVPipeline",),
        gives_raw=True,
        plain=PATCHED,
    ),
    PipelineFamily("ERNIE-Image", "ErnieImagePipeline", plain=PATCHED),
    PipelineFamily("Bria Fibo 2", "BriaFibo2Pipeline", plain=PATCHED),
    PipelineFamily("Ideogram 4", "Ideogram4Pipeline", plain=PATCHED),
    PipelineFamily("DreamLite", "DreamLitePipeline", shift=True, plain=("AutoencoderTiny",)),
    PipelineFamily("DreamLite mobile", "DreamLiteMobilePipeline", shift=True, plain=("AutoencoderTiny",)),
)
FAMILY_BY_CLASS = {name: family for family in FAMILIES for name in family.classes}


# Every other pipeline class of diffusers, by the reason why it is in no family (`tests/pipelines/test_coverage.py`).
_OUT_OF_SCOPE = {
    "makes sound": """
        AceStepPipeline AudioDiffusionPipeline AudioLDM2Pipeline AudioLDMPipeline DanceDiffusionPipeline
        LongCatAudioDiTPipeline MusicLDMPipeline SpectrogramDiffusionPipeline StableAudio3AudioToAudioPipeline
        StableAudio3InpaintPipeline StableAudio3Pipeline StableAudioPipeline
    """,
    "its autoencoder is one of videos, with latents B C T h w": """
        AllegroPipeline AnyFlowFARPipeline AnyFlowPipeline BriaFiboEditPipeline BriaFiboPipeline ChronoEditPipeline
        CogVideoXFunControlPipeline CogVideoXPipeline ConsisIDPipeline Cosmos2TextToImagePipeline Cosmos2VideoToWorldPipeline
        Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline Cosmos3OmniPipeline CosmosTextToWorldPipeline
        CosmosVideoToWorldPipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline EasyAnimatePipeline HeliosPipeline
        HeliosPyramidPipeline HunyuanImageRefinerPipeline HunyuanVideo15Pipeline HunyuanVideoFramepackPipeline
        HunyuanVideoPipeline JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky5I2VPipeline Kandinsky5T2VPipeline
        Kandinsky6SRPipeline Kandinsky6TI2VAPipeline Krea2Pipeline LTX2ConditionPipeline LTX2DFRPipeline
        LTX2DFRTemporalRefinePipeline LTX2HDRPipeline LTX2InContextPipeline LTX2LatentUpsamplePipeline LTX2Pipeline
        LTX2VideoDiffusionDecodePipeline LTXConditionPipeline LTXI2VLongMultiPromptPipeline LTXLatentUpsamplePipeline
        LTXPipeline LucyEditPipeline MochiPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline NucleusMoEImagePipeline
        QwenImage21Pipeline QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline QwenImageEditInpaintPipeline
        QwenImageEditPipeline QwenImageEditPlusPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
        QwenImageLayeredPipeline QwenImagePipeline SanaVideoPipeline SanaWMLTX2Refiner SanaWMPipeline
        SkyReelsV2DiffusionForcingPipeline SkyReelsV2Pipeline StableVideoDiffusionPipeline WanAnimatePipeline WanPipeline
        WanVACEPipeline
    """,
    "draws videos: its latents have a time axis (B C T h w)": """
        AnimateDiffControlNetPipeline AnimateDiffPAGPipeline AnimateDiffPipeline AnimateDiffSDXLPipeline
        AnimateDiffSparseControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline AnimateDiffVideoToVideoPipeline
        CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline HunyuanSkyreelsImageToVideoPipeline
        HunyuanVideo15ImageToVideoPipeline HunyuanVideoImageToVideoPipeline I2VGenXLPipeline LTX2ImageToVideoPipeline
        LTXImageToVideoPipeline LattePipeline PIAPipeline SanaImageToVideoPipeline
        SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline
        SkyReelsV2ImageToVideoPipeline TextToVideoSDPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline
        VideoToVideoSDPipeline WanImageToVideoPipeline WanVideoToVideoPipeline
    """,
    "draws pixels, without an autoencoder": """
        ConsistencyModelPipeline DDIMPipeline DDPMPipeline IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline
        IFInpaintingPipeline IFInpaintingSuperResolutionPipeline IFPipeline IFSuperResolutionPipeline KarrasVePipeline
        PNDMPipeline PRXPixelPipeline RePaintPipeline ScoreSdeVePipeline UnCLIPImageVariationPipeline UnCLIPPipeline
    """,
    "deprecated by diffusers; like any undeclared pipeline it is tried by measurement": """
        AltDiffusionImg2ImgPipeline AltDiffusionPipeline BlipDiffusionControlNetPipeline BlipDiffusionPipeline
        CycleDiffusionPipeline PaintByExamplePipeline SemanticStableDiffusionPipeline StableDiffusionAttendAndExcitePipeline
        StableDiffusionControlNetXSPipeline StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline
        StableDiffusionGLIGENTextImagePipeline StableDiffusionInpaintPipelineLegacy StableDiffusionLDM3DPipeline
        StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline StableDiffusionParadigmsPipeline
        StableDiffusionPipelineSafe StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline
        StableDiffusionXLControlNetXSPipeline UniDiffuserPipeline VersatileDiffusionDualGuidedPipeline
        VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline VersatileDiffusionTextToImagePipeline
    """,
    "inverts a picture before it draws; like any undeclared pipeline it is tried by measurement": """
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
    """,
    "its autoencoder, in the part `vqvae`, is one of codes or of the first latent diffusion": """
        AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline LDMPipeline LDMSuperResolutionPipeline
        LDMTextToImagePipeline VQDiffusionPipeline
    """,
    "runs in ONNX, without a torch autoencoder": """
        OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline OnnxStableDiffusionInpaintPipelineLegacy
        OnnxStableDiffusionPipeline OnnxStableDiffusionUpscalePipeline StableDiffusionOnnxPipeline
    """,
    "decodes by a diffusion of its own, without an autoencoder in the part `vae`": """
        StableCascadeDecoderPipeline WuerstchenDecoderPipeline
    """,
    "calls other pipelines one after the other; those of the table among them are declared": """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline
        StableCascadeCombinedPipeline VisualClozePipeline WuerstchenCombinedPipeline
    """,
    "makes embeddings for another pipeline and no picture": """
        FluxPriorReduxPipeline KandinskyPriorPipeline KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline
        StableCascadePriorPipeline WuerstchenPriorPipeline
    """,
    "writes text": """
        DiffusionGemmaPipeline LLaDA2Pipeline
    """,
    "measures depth, normals or materials in a picture and draws none": """
        MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline
    """,
    "knows statistics of each channel and no factor; like any undeclared pipeline it is tried by measurement": """
        GlmImagePipeline
    """,
    "makes proteins": """
        RFD4ProteinaPipeline
    """,
    "makes shapes in space": """
        ShapEImg2ImgPipeline ShapEPipeline
    """,
}
OUT_OF_SCOPE = {name: reason for reason, names in _OUT_OF_SCOPE.items() for name in names.split()}
