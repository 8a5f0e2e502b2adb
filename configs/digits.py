"""A diffusion transformer on handwritten digits: the default. No download, minutes on a laptop.

  python -m ant_jax.main --config configs/digits.py              # Nash-MTL on SNR clusters
  python -m ant_jax.main --config configs/digits.py:vanilla      # the baseline
  python -m ant_jax.main --config configs/digits.py:uncertainty,timestep --config.num_steps=1000

The argument after the colon is METHOD or METHOD,CLUSTERS. --config.NAME=VALUE sets any option on
the command line. This file documents all options; the other configs only change values.
In paths, ~ is the home folder; config.json stores paths as written.
Expected result: see the README.
"""

import ml_collections


def get_config(argument: str = "nash,snr") -> ml_collections.ConfigDict:
    """The config for METHOD or METHOD,CLUSTERS."""
    method, _, clusters = argument.partition(",")
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the parameters, data order, timesteps and noise
    config.num_steps = 3000

    config.data = data = ml_collections.ConfigDict()
    # "digits", "folder", "tfds:BUILDER" (as "tfds:cifar10"), or your own "package.module:function"
    data.name = "digits"
    data.split = "train"  # of a folder: the subfolder of the split, "" if there is none
    data.dir = ""  # the folder, or where tensorflow-datasets keeps its data; "" is its own default
    data.image_size = 8  # pixels; images of another size need a crop
    data.crop = "none"  # "none", "center" or "random"
    # Of a folder: "ignore" takes the pixels as they are stored, as ADM does, so that statistics
    # compare; "apply" turns photographs as their cameras noted. Alpha is dropped either way.
    data.exif = "ignore"
    data.flip = False  # mirror half of the images
    data.replace_unreadable = False  # damaged images by the next one; else the run fails there
    data.batch_size = 120  # over all devices; each device's share must be a multiple of k
    data.num_workers = 0  # processes that decode images ahead of time

    config.diffusion = diffusion = ml_collections.ConfigDict()
    diffusion.timesteps = 1000  # T, at most 10 000
    diffusion.schedule = "cosine"  # "cosine", "linear" or "ldm"
    diffusion.variance = "fixed_large"  # "fixed_small", "fixed_large" or "learned_range"
    diffusion.prediction = "epsilon"  # what the model predicts: "epsilon", the noise, or "v"
    diffusion.loss_weight = "none"  # "none", "p2" or "min_snr"
    diffusion.p2_k = 1.0
    diffusion.p2_gamma = 1.0
    diffusion.min_snr_gamma = 5.0
    diffusion.clip_x0 = True  # clip predicted images to [-1, 1] in sampling: pixels yes, latents no

    config.model = model = ml_collections.ConfigDict()
    model.name = "dit"  # a diffusion transformer, "dit", a "unet", or your "package.module:Class"
    model.width = 64  # features of a token; of a UNet: channels where channel_mult is 1
    model.depth = 4  # of "dit", as the next two: blocks
    model.heads = 4
    model.patch = 4  # 1, 2, 4 or 8
    # Of "unet", as the next six: channels of each level as multiples of the width. Each level but
    # the first has half the resolution of the one before.
    model.channel_mult = (1, 2)
    model.num_res_blocks = 2  # of each level
    model.attention_factors = (2,)  # attention where the image is so many times smaller
    model.head_channels = 32  # of an attention head; 0 where num_heads is given instead
    model.num_heads = 0  # wherever attention is, as in ADM for 128 x 128; 0 by head_channels
    model.scale_shift_norm = True  # True and True for ADM, False and False for LDM
    model.resblock_updown = True
    model.conditional = True  # on the class label
    model.dtype = "float32"  # of activations: "bfloat16" on GPU and TPU
    # What the backward pass computes again instead of keeping it: "none"; "blocks", all that is
    # inside a block; or "dots", all but the outputs of dense layers and convolutions.
    model.remat = "none"
    model.attention = "xla"  # or "cudnn", fused: on NVIDIA's GPUs, with dtype "bfloat16"

    # Diffusion in the latents of an autoencoder. --mode encode makes latents of the images that
    # config.data describes; training reads them; samples are decoded.
    config.autoencoder = autoencoder = ml_collections.ConfigDict()
    # LDM's "KL-f4", "KL-f8", "KL-f16", "KL-f32", "VQ-f4", "VQ-f4-noattn", "VQ-f8", "VQ-f8-n256" or
    # "VQ-f16", or "KL-f4-small" for trying out; "" for diffusion in pixels.
    autoencoder.name = ""
    autoencoder.weights = ""  # its .safetensors, .pt, .pth or .ckpt file
    autoencoder.latents = ""  # the folder of the latents
    autoencoder.scale = 1.0  # factor that gives them about unit variance: 0.18215 for KL-f8
    autoencoder.batch_size = 32  # images encoded or decoded at a time

    # Parameters to begin with: the EMA of another run's workdir, or a .safetensors, .pt, .pth or
    # .ckpt file of DiT, ADM or LDM. "" for fresh ones.
    config.init_from = ""
    # What such a file doesn't tell, unless --mode export wrote it, joined by commas. Of a UNet: the
    # order of its attention's channels, "heads_first" or "qkv_first" (ADM's
    # use_new_attention_order); "num_heads=N" or "head_channels=N"; and "null_row" if the last row
    # of its label table is that of a null class. Of a DiT: "heads=N" if its size is not a published
    # one; "no_null_row" if no labels were dropped in its training; and "no_pos_embed" if the file
    # lacks the position encoding and it is the paper's.
    config.init_facts = ""

    config.clusters = ml_collections.ConfigDict()
    config.clusters.k = 5
    # "snr", "timestep", "gradient" (by task affinity) or "random" (no intervals: a control)
    config.clusters.cost = clusters or "snr"
    config.clusters.affinity = ""  # for "gradient": an .npz of experiments.task_affinity
    config.clusters.only = -1  # train a specialist on this cluster alone; -1 for all clusters

    config.method = ml_collections.ConfigDict()
    config.method.name = method  # "vanilla", "linear", "uncertainty", "pcgrad" or "nash"
    config.method.linear_weights = ""  # fixed weights of linear, "w1,...,wk"; "" for 1/k each
    config.method.uncertainty_learning_rate = 0.025
    config.method.nash_update_every = 1  # renew Nash's weights at every so many-th step
    config.method.nash_max_norm = 1.0
    # Multiply cluster losses by k times their share of the timesteps before the method sees them:
    # linear then is vanilla in expectation.
    config.method.share_weighted = False
    config.method.cosines = False  # report those of the cluster gradients whatever the method
    # "stratified": batch_size / k timesteps in each cluster; "uniform": uniform over all timesteps,
    # which methods with a Gram matrix (pcgrad, nash) can only do with gradient_form = "masked".
    # Vanilla always draws uniformly.
    config.method.timesteps = "stratified"
    config.method.gradient_form = "vmap"  # k gradients by "vmap", "scan" (less memory) or "masked"

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.learning_rate = 3e-3
    optimizer.warmup_steps = 100  # linear, from 0
    optimizer.schedule = "constant"  # or "cosine", to 0 at num_steps
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 0.0  # of the combined gradient; 0 for no clipping
    optimizer.frozen = ""  # parameters to leave as they are: a pattern such as "embedding|block_0/"
    optimizer.nonfinite = "stop"  # or "skip": a step whose loss or gradient is not finite
    optimizer.microbatches = 1  # the batch is worked off in so many parts
    config.ema_decay = 0.999  # ramped up from 0.1
    config.label_dropout = 0.1  # for classifier-free guidance

    config.log_every = 100  # steps
    config.tensorboard = True  # where TensorFlow is installed
    config.profile_steps = 0  # trace so many steps, from the 10th on, into WORKDIR/profile
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 500  # steps; the last step is always saved
    config.checkpoint.keep = 2  # newest checkpoints
    config.checkpoint.keep_period = 0  # keep each checkpoint at a multiple of this; 0 for none

    config.sample = sample = ml_collections.ConfigDict()
    sample.seed = 0  # another seed draws other samples from the same run
    sample.every = 1000  # steps between grids of samples while training; 0 for none
    sample.sampler = "ddim"  # "ddim" or "ddpm"
    sample.num_steps = 50
    # Which timesteps: "even"; "10,20,20", so many in each section of equal length, the least noisy
    # first; "ddim", a fixed stride from 0; or "ldm", LDM's, which end with a little noise.
    sample.spacing = "even"
    sample.eta = 0.0  # of DDIM
    sample.guidance = 1.0  # scale of classifier-free guidance; 1 for none
    sample.guidance_channels = 0  # guide so many channels, from the first; 0 for all
    sample.batch_size = 600
    sample.num = 1797  # how many --mode sample and --mode evaluate draw
    config.evaluation = evaluation = ml_collections.ConfigDict()
    # What judges samples: "digits", a small classifier of them; "inception" for FID, sFID,
    # Inception score, precision and recall; "" for none.
    evaluation.features = "digits"
    # For "inception": the path of pt_inception-2015-12-05-6726825d.pth, a release of pytorch-fid.
    evaluation.inception = ""
    # For "inception": an .npz of images, statistics or both, as ADM's reference batches; "" for the
    # training data, whose statistics are kept in ~/.cache/ant_jax.
    evaluation.reference = ""
    evaluation.samples = ""  # an .npz of samples to judge, not sorted by class; "" to draw them
    evaluation.split = "test"  # held-out images for validation losses; "" for none
    return config
