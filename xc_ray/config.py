"""The two YAML doors: ServeFile (a whole Serve YAML, ServeConfig its `args`) and TrainConfig.

Ray Serve drops unknown deployment keys in silence (`num_gpu: 1` is accepted and ignored), so a file
is checked here: unknown keys are refused with the nearest known name.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from xc_ray.engine.config import MAX_LORA_RANK
from xc_ray.errors import ConfigError

MAX_SLOTS = 256
MAX_AUTO_SLOTS = 8  # of `adapters.slots: auto`


def _share(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (number and 0 <= value <= 64):
        return value
    raise ValueError(f"a share is auto or a number from 0 to 64 (found {value!r:.80})")


def _slots(value: Any) -> Any:
    if value == "auto" or (type(value) is int and 0 <= value <= MAX_SLOTS):
        return value
    raise ValueError(f"slots are auto or a number from 0 to {MAX_SLOTS} (found {value!r:.80})")


Share = Annotated[Literal["auto"] | float, BeforeValidator(_share)]
Resources = dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0)]]
# Shares of one GPU when `auto` finds a GPU in the cluster. The tower's weights are 3 % of a 24 GB
# card; a CUDA context and room for a picture of 55 tiles are the rest (`xc-ray plan`).
AUTO_ENCODER_SHARE = 0.15
AUTO_DECODER_SHARE = 0.85

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A frozen model that refuses unknown keys with the nearest known name."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(_unknown(str(key), list(cls.model_fields)))
        return values


class EncoderOptions(Strict):
    """The vision encoder's replica: its share of a GPU, and how pictures go through the tower.

    A square is a tile or an overview; a pass takes up to `max_squares` of them, of all pictures
    that wait. A pass that is not full waits up to `batch_wait_ms` for pictures that are being read,
    never when there are none. Pictures are read on `num_cpus` threads, at least two. Embeddings
    stay in `cache_gb` of host memory (10⁹ bytes; one of 24 tiles takes 0.083 at 7B).
    `compile_tower` and `cuda_graphs` make passes faster and the start slower; ignored on CPU.
    `resources` are Ray's own, by name: a replica runs where a node has so much of them left.
    """

    num_gpus: Share = "auto"
    num_cpus: float = Field(0.25, ge=0)
    resources: Resources = {}
    max_squares: int = Field(8, ge=1, le=256)
    batch_wait_ms: float = Field(1.0, ge=0, le=1000)
    cache_gb: float = Field(4.0, ge=0)
    compile_tower: bool = True
    cuda_graphs: bool = True


class DecoderOptions(Strict):
    """The decoder's replica: its share of a GPU, and the engine's limits.

    `kv_cache_tokens` is derived from the share unless given; on CPU it is four of the longest
    requests. `kv_cache_dtype` is the model's own (`auto`) or 8-bit floats (`fp8`: about twice the
    tokens in the same room, at some loss of precision). `prefix_cache` spares requests that begin
    as an earlier one did, pictures included, what that one computed; with `prefix_cache_per_key`
    only requests of one key share, embeddings of pictures included. `cuda_graphs` makes decode
    steps faster and the start slower; ignored on CPU. Of several decoders a request prefers the one
    that holds its beginning, unless that has more than `load_factor` times the mean to do.
    `resources` as for the encoder.
    """

    num_gpus: Share = "auto"
    num_cpus: float = Field(0.25, ge=0)
    resources: Resources = {}
    max_num_seqs: int = Field(32, ge=1, le=4096)
    max_prefill_tokens: int = Field(4096, ge=16)
    kv_cache_tokens: int | None = Field(None, ge=1)
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    prefix_cache: bool = True
    prefix_cache_per_key: bool = False
    cuda_graphs: bool = True
    load_factor: float = Field(1.5, ge=1)


class AdapterOptions(Strict):
    """LoRA adapters of the registry, as `BASE:ADAPTER[@…]` in requests.

    `slots` adapters are on the device at once, more wait for their turn; `auto` is up to
    MAX_AUTO_SLOTS of them, as many as the decoder's share holds beside weights, activations and the
    cache of the longest request; 0 serves the base alone. `max_rank` is the largest that a slot
    holds. The registry is read each `poll_s` seconds (±20 %). Adapters that were used stay in
    `host_cache_gb` of each decoder's memory (10⁹ bytes).
    """

    slots: Annotated[Literal["auto"] | int, BeforeValidator(_slots)] = "auto"
    max_rank: int = Field(MAX_LORA_RANK, ge=1, le=MAX_LORA_RANK)
    poll_s: float = Field(5.0, ge=0.1)
    host_cache_gb: float = Field(8.0, ge=0)


class IngressOptions(Strict):
    """The HTTP ingress's replica."""

    num_cpus: float = Field(0.25, ge=0)


class Allowance(Strict):
    """What one key may use: a minute, and at the same time; no limit where nothing is given.

    Tokens are those of the prompt and of the answer (`max_tokens` until it has ended). Each replica
    of the ingress counts for itself.
    """

    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    tiles_per_minute: float | None = Field(None, gt=0)
    concurrent: int | None = Field(None, ge=1)


class Limits(Strict):
    """What one request may bring: bytes, pixels and counts; and take: seconds until it has ended.

    `max_request_bytes` holds for the body, and for all pictures that it has fetched; the body must
    be there within `max_body_s`. `max_held_bytes` holds for the bodies and the fetched pictures of
    all requests that a replica of the ingress has under way; who finds no room is refused with 429.
    `max_decode_s` is what decoding one picture may take of a core.

    Requests that a decoder has no room for yet wait there, up to `max_waiting` and for `max_wait_s`
    seconds, the keys in turn; others are refused with 429 at once. `per_key` bounds each key.

    The drain of a replica (`graceful_shutdown_timeout_s`) should outlive `max_request_s`. A stream
    in which nothing is said for `heartbeat_s` seconds gets a comment that keeps it open.
    """

    max_request_bytes: int = Field(64 << 20, ge=1024)
    max_held_bytes: int = Field(1 << 30, ge=2048)
    max_images: int = Field(32, ge=0)
    max_image_bytes: int = Field(20 << 20, ge=1)
    max_image_pixels: int = Field(89_478_485, ge=1)
    max_decode_s: float = Field(10.0, gt=0)
    max_tiles: int = Field(55, ge=1)
    max_body_s: float = Field(60.0, gt=0)
    max_request_s: float = Field(600.0, gt=0)
    heartbeat_s: float = Field(10.0, gt=0)
    max_waiting: int = Field(256, ge=0)
    max_wait_s: float = Field(10.0, gt=0)
    per_key: Allowance = Allowance()

    @model_validator(mode="after")
    def _one_request_is_held(self) -> Self:
        # A body, and as much again of pictures; refused by itself it would come again for ever.
        if self.max_held_bytes < 2 * self.max_request_bytes:
            raise ValueError(
                f"max_held_bytes is {self.max_held_bytes:,} and max_request_bytes "
                f"{self.max_request_bytes:,}: one request may hold twice as much as that, its "
                "pictures included; raise the one or lower the other"
            )
        return self


class MediaOptions(Strict):
    """How the ingress fetches http(s) pictures.

    `allow_hosts` narrows to these host names; `allow_private` names networks (CIDR) that are not
    public and may be reached all the same.
    """

    allow_hosts: tuple[str, ...] | None = None
    allow_private: tuple[str, ...] = ()
    timeout_s: float = Field(10.0, gt=0)


class ServeConfig(Strict):
    """`args` of the application: the model and how its replicas share the hardware.

    `model` is `demo`, a folder, a Hugging Face or ModelScope id, or a base of the registry
    (NAME[@VERSION|@ALIAS]). `registry` is where that is, and the adapters: a folder, file://…,
    s3://…, gs://… or az://…; by default a folder of this user's. `num_gpus: auto` means a share of
    one GPU if the cluster has any, else CPU; `expect_gpus` says that it will have them, though none
    may have joined yet, as where nodes are started for what waits.

    `keys` is a file of who may use it (`keys.KeyFile`). Without one it serves on a loopback address
    only, unless `insecure` says that whoever reaches it may use it.
    """

    model: str = "demo"
    registry: str | None = None
    keys: str | None = None
    insecure: bool = False
    served_model_name: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: int | None = Field(None, ge=16)
    expect_gpus: bool = False
    ingress: IngressOptions = IngressOptions()
    encoder: EncoderOptions = EncoderOptions()
    decoder: DecoderOptions = DecoderOptions()
    adapters: AdapterOptions = AdapterOptions()
    limits: Limits = Limits()
    media: MediaOptions = MediaOptions()

    @field_validator("keys")
    @classmethod
    def _the_same_everywhere(cls, keys: str | None) -> str | None:
        # Replicas have working directories of their own, on other nodes.
        if keys is not None and not Path(keys).is_absolute():
            raise ValueError(f"keys is a path from the root, such as /etc/xc_ray/keys.yaml: {keys}")
        return keys

    @model_validator(mode="after")
    def _keys_or_none(self) -> Self:
        if self.keys is not None and self.insecure:
            raise ValueError(
                f"keys is {self.keys} and insecure is true, which is for a server without keys; "
                "give one of the two"
            )
        return self

    @property
    def public_name(self) -> str:
        """The model's name in requests: `served_model_name`, or the last part of `model`."""
        if self.served_model_name:
            return self.served_model_name
        return self.model.rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]

    def resolve(self, num_gpus: float) -> "ServeConfig":
        """A copy with `auto` shares replaced for a cluster of `num_gpus` GPUs.

        Raises:
            ConfigError: a share is asked for and the cluster has no GPU.
        """
        if self.expect_gpus:
            num_gpus = math.inf  # what has joined by now says nothing
        encoder = self.encoder.num_gpus
        decoder = self.decoder.num_gpus
        if num_gpus == 0 and any(s not in ("auto", 0) for s in (encoder, decoder)):
            raise ConfigError(
                f"encoder.num_gpus is {encoder} and decoder.num_gpus is {decoder}, "
                "but the cluster has no GPU; set them to auto or 0 to run on CPU",
                param="num_gpus",
            )
        on_gpu = num_gpus > 0
        if encoder == "auto":
            encoder = AUTO_ENCODER_SHARE if on_gpu else 0.0
        if decoder == "auto":
            decoder = AUTO_DECODER_SHARE if on_gpu else 0.0
        if num_gpus and encoder + decoder > num_gpus:
            raise ConfigError(
                f"encoder.num_gpus is {encoder} and decoder.num_gpus is {decoder}, together "
                f"{encoder + decoder:g}, and the cluster has {num_gpus:g}; lower one of them",
                param="num_gpus",
            )
        return self.model_copy(
            update={
                "encoder": self.encoder.model_copy(update={"num_gpus": encoder}),
                "decoder": self.decoder.model_copy(update={"num_gpus": decoder}),
            }
        )


class HttpOptions(Strict):
    """Serve's `http_options`."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = None
    keep_alive_timeout_s: int = 90


class EncoderPolicyOptions(Strict):
    """`policy_kwargs` of serve.scale:EncoderPolicy."""

    target_wait_s: float = Field(1.0, gt=0)
    target_use: float = Field(0.7, gt=0, le=1)
    stale_s: float = Field(60.0, gt=0)


class DecoderPolicyOptions(Strict):
    """`policy_kwargs` of serve.scale:DecoderPolicy."""

    target_use: float = Field(0.8, gt=0, le=1)
    target_prefill_use: float = Field(0.6, gt=0, le=1)
    target_wait_s: float = Field(2.0, gt=0)
    stale_s: float = Field(60.0, gt=0)


POLICIES: dict[str, type[Strict]] = {
    "xc_ray.serve.scale:EncoderPolicy": EncoderPolicyOptions,
    "xc_ray.serve.scale:DecoderPolicy": DecoderPolicyOptions,
}


class PolicyOptions(Strict):
    """A policy `MODULE:NAME`, and what its class is made with; one of ours or anybody's."""

    policy_function: str = Field(pattern=r"^[\w.]+:\w+$")
    policy_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known_kwargs(self) -> Self:
        module, _, name = self.policy_function.partition(":")
        if module == "xc_ray.serve.scale" and self.policy_function not in POLICIES:
            raise ValueError(f"no policy {name!r} in {module}; known are {', '.join(POLICIES)}")
        if self.policy_function in POLICIES:
            try:
                POLICIES[self.policy_function].model_validate(self.policy_kwargs)
            except ValidationError as e:
                raise ValueError(f"policy_kwargs: {first_of(e)}") from None
        return self


class AutoscalingOptions(Strict):
    """Serve's `autoscaling_config`; what is not given is Serve's default.

    Delays say for how long a policy must want more, or fewer, before that is done. Metrics are
    taken over the last `look_back_period_s` by `aggregation_function`. How often replicas report is
    in the environment (docs/operations.md).
    """

    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    initial_replicas: int | None = Field(None, ge=0)
    target_ongoing_requests: float | None = Field(None, gt=0)
    upscale_delay_s: float | None = Field(None, ge=0)
    downscale_delay_s: float | None = Field(None, ge=0)
    downscale_to_zero_delay_s: float | None = Field(None, ge=0)
    look_back_period_s: float | None = Field(None, gt=0)
    upscaling_factor: float | None = Field(None, gt=0)
    downscaling_factor: float | None = Field(None, gt=0)
    aggregation_function: Literal["mean", "max", "min"] | None = None
    policy: PolicyOptions | None = None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        initial = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= initial <= self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, initial_replicas {self.initial_replicas}, "
                f"max_replicas {self.max_replicas}: they must stand in this order"
            )
        return self


class DeploymentOptions(Strict):
    """One entry of `deployments:`; keys of Serve that may change in place."""

    name: Literal["Ingress", "Decoder", "VisionEncoder"]
    num_replicas: int | Literal["auto"] | None = None
    max_ongoing_requests: int | None = Field(None, ge=1)
    max_queued_requests: int | None = None
    autoscaling_config: AutoscalingOptions | None = None
    graceful_shutdown_timeout_s: float | None = Field(None, ge=0)
    graceful_shutdown_wait_loop_s: float | None = Field(None, ge=0)
    health_check_period_s: float | None = Field(None, gt=0)
    health_check_timeout_s: float | None = Field(None, gt=0)
    max_replicas_per_node: int | None = None
    user_config: Any = None
    logging_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.num_replicas is not None and self.autoscaling_config is not None:
            raise ValueError(
                f"{self.name} has num_replicas ({self.num_replicas}) and autoscaling_config; "
                "give one of the two"
            )
        return self


class ApplicationOptions(Strict):
    """One entry of `applications:`."""

    name: str
    import_path: Literal["xc_ray.serve.app:build"]
    route_prefix: str = "/"
    runtime_env: dict[str, Any] | None = None
    args: ServeConfig = ServeConfig()
    deployments: tuple[DeploymentOptions, ...] = ()


class ControllerEnvironment(Strict):
    """Variables of the environment, for Serve's controller alone."""

    env_vars: dict[str, str] = Field(default_factory=dict)


class ControllerOptions(Strict):
    """Of Serve's controller; read when it starts, ignored by one that runs."""

    runtime_env: ControllerEnvironment = ControllerEnvironment()


class ServeFile(Strict):
    """A Serve config file of this project."""

    proxy_location: Literal["Disabled", "HeadOnly", "EveryNode"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    controller_options: ControllerOptions | None = None
    logging_config: dict[str, Any] | None = None
    tracing_config: dict[str, Any] | None = None
    applications: tuple[ApplicationOptions, ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: str | Path) -> "ServeFile":
        """Reads and checks a file.

        Raises:
            ConfigError: one line: the key, its value, and what was expected.
        """
        return read_as(cls, path)


def _data_files(value: Any) -> Any:
    """One data set or several, each a name or `{path, weight}`."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


class DataFile(Strict):
    """A data set: a file or folder, an address, or a name (docs/training.md lists them).

    With a `weight` of 2 each epoch holds every row twice, with 0.5 half of them, others each time.
    """

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, le=1000)


DataFiles = Annotated[tuple[DataFile, ...], BeforeValidator(_data_files)]


class DataOptions(Strict):
    """What is learnt, and what becomes of rows that cannot be.

    Loss is validated on `validation`, or on a share `validation_split` of the training rows, taken
    by the seed. `max_length` is in tokens, the model's own if None; `on_long` says what becomes of
    a longer conversation: `cut_history` drops its oldest turns, pictures with them, until it fits.
    `image_transform: family` is that of the original fine-tuning code.
    """

    train: DataFiles = Field(min_length=1)
    validation: DataFiles | None = None
    validation_split: float = Field(0.0, ge=0, le=0.5)
    max_length: int | None = Field(None, ge=16)
    max_tiles: int | None = Field(None, ge=1)
    on_long: Literal["fail", "skip", "cut_history"] = "fail"
    on_bad_row: Literal["fail", "skip"] = "fail"
    image_transform: Literal["serving", "family"] = "serving"

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation is not None and self.validation_split:
            raise ValueError(
                f"validation names data sets and validation_split is {self.validation_split}; "
                "give one of the two"
            )
        return self


Target = Literal[  # model.config.PLORA_LINEARS, which no type checker can read
    "attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"
]


class LoraOptions(Strict):
    """LoRA (2106.09685) on the linear maps `targets` of every layer; PLoRA is never touched."""

    rank: int = Field(64, ge=1, le=MAX_LORA_RANK)
    alpha: float = Field(64.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[Target, ...] = Field(get_args(Target), min_length=1)
    rslora: bool = False


class StepOptions(Strict):
    """Steps of the optimizer.

    A step learns from workers × `batch_size` × `accumulation` conversations. With `packing` up to
    `batch_size` of them go through the network end to end, as long as they fit into `pack_tokens`
    (`max_length` if None); without, one after the other. The loss is the same either way.
    `warmup` is a share of all steps. `epochs` counts unless `max_steps` is given.
    """

    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1, le=65536)
    accumulation: int = Field(1, ge=1, le=65536)
    packing: bool = True
    pack_tokens: int | None = Field(None, ge=16)
    group_by_length: bool = False
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = True
    seed: int = Field(0, ge=0, lt=2**31)


class CheckpointOptions(Strict):
    """A checkpoint each `every_steps` steps and at the end.

    The newest is kept, and of the others the best `keep` by validation loss (the newest without).
    """

    every_steps: int = Field(100, ge=1)
    keep: int = Field(2, ge=1)


class ValidationOptions(Strict):
    """Loss on the validation rows each `every_steps` steps and at the end.

    `generate` rows are also answered greedily, with up to `max_tokens` tokens each.
    """

    every_steps: int = Field(100, ge=1)
    generate: int = Field(2, ge=0, le=64)
    max_tokens: int = Field(64, ge=1)


class WorkerOptions(Strict):
    """The processes that train, one a GPU where `use_gpu`.

    `num` is a number, or [least, most] for as many as the cluster has; `auto` is every GPU, or one
    process on CPU. A worker that is lost is replaced up to `max_failures` times; one that has not
    moved for `hang_timeout_s` is named, killed and replaced likewise.
    """

    num: Literal["auto"] | int | tuple[int, int] = "auto"
    use_gpu: Literal["auto"] | bool = "auto"
    num_cpus: float = Field(1.0, gt=0)
    max_failures: int = Field(3, ge=0)
    hang_timeout_s: float = Field(600.0, ge=1)

    @field_validator("num")
    @classmethod
    def _in_order(cls, num: Any) -> Any:
        least, most = num if isinstance(num, tuple) else (num, num)
        if num != "auto" and not 1 <= least <= most <= 4096:
            raise ValueError(f"num is auto, a number of at least 1, or [least, most] (found {num})")
        return num


class PromoteOptions(Strict):
    """Points `alias` at the pushed version if its `metric` is below a threshold."""

    alias: str = Field("prod", min_length=1)
    metric: Literal["validation_loss", "train_loss"] = "validation_loss"
    below: float


class PublishOptions(Strict):
    """The adapter's name in the registry, and what else happens there at the end.

    `import_base` brings the base there first if it is not there yet.
    """

    adapter: str = Field(min_length=1)
    import_base: bool = False
    promote: PromoteOptions | None = None


class TrackOptions(Strict):
    """Where metrics go beside `metrics.jsonl`; `mlflow` and `wandb` name a project each."""

    tensorboard: bool = False
    mlflow: str | None = None
    wandb: str | None = None


class TrainConfig(Strict):
    """LoRA fine-tuning of one base: `xc-ray train FILE`.

    `model` is the base: `demo`, a folder, a hub id or a base of the registry. `storage` is where
    the run `name` keeps its checkpoints: a folder, file://…, s3://…, gs://… or az://…; by default a
    folder of this user's.
    """

    model: str = "demo"
    registry: str | None = None
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    storage: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    data: DataOptions
    lora: LoraOptions = LoraOptions()
    training: StepOptions = StepOptions()
    validation: ValidationOptions = ValidationOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    workers: WorkerOptions = WorkerOptions()
    publish: PublishOptions | None = None
    track: TrackOptions = TrackOptions()

    @classmethod
    def read(cls, path: str | Path) -> "TrainConfig":
        """Reads and checks a file.

        Raises:
            ConfigError: one line: the key, its value, and what was expected.
        """
        return read_as(cls, path)


def read_as(model: type[Model], path: str | Path) -> Model:
    """Reads a YAML file and checks it.

    Raises:
        ConfigError: one line: the key, its value, and what was expected.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror or e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(e).split())}") from None
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise ConfigError(f"{path}: {first_of(e)}") from None


def first_of(error: ValidationError) -> str:
    """The first of its complaints in one line: where, what, and the value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "value_error" else f" (found {first['input']!r:.80})"
    return f"{where + ': ' if where else ''}{message}{value}"


def _unknown(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"
