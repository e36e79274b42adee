"""Arm, table, objects, light and front camera as one MuJoCo model; their appearance is random by seed, or fixed."""

import math
from dataclasses import dataclass

import mujoco
import numpy as np

from rynnvla_jax.sim import arm, objects
from rynnvla_jax.sim.tasks import COLORS, ObjectPositions

TIMESTEP = 1 / 600  # seconds
_TEXTURE = 256  # pixels a side
_PRINTED = ((1.0, 0.45, 0.05), (0.95, 0.75, 0.1), (0.9, 0.9, 0.88), (0.2, 0.45, 0.8), (0.75, 0.12, 0.12))


@dataclass(frozen=True)
class Look:
    """What the cameras see besides the objects' places. Colours 0..1 RGB; metres; radians."""

    table: tuple[float, float, float] = (0.72, 0.60, 0.45)
    pattern: str = "speckle"  # plain | speckle | grain | checks
    sky: tuple[float, float, float] = (0.75, 0.78, 0.80)
    arm: tuple[float, float, float] = _PRINTED[0]
    plate: tuple[float, float, float] = (0.93, 0.93, 0.95)
    tint: float = 0.0  # greatest change of an object's colour
    ambient: float = 0.45
    light: float = 0.45
    light_from: tuple[float, float, float] = (0.1, -0.4, 1.0)
    camera: tuple[float, float, float] = (0.64, 0.0, 0.48)
    camera_at: tuple[float, float, float] = (0.11, 0.0, 0.05)
    camera_fovy: float = 40.0  # degrees: what the arm can reach fills the picture
    wrist_fovy: float = 70.0  # degrees

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> "Look":
        """A random appearance: colours, pattern, light, camera."""
        wood = np.array(cls.table) if rng.random() < 0.5 else rng.uniform(0.35, 0.8, 3)
        return cls(
            table=color(wood + rng.normal(0, 0.06, 3)),
            pattern=str(rng.choice(("plain", "speckle", "grain", "checks"))),
            sky=color(rng.uniform(0.4, 0.9) + rng.normal(0, 0.05, 3)),
            arm=color(np.array(_PRINTED[rng.integers(len(_PRINTED))]) + rng.normal(0, 0.03, 3)),
            plate=color(rng.uniform(0.82, 0.97) + rng.normal(0, 0.02, 3)),
            tint=0.06,
            ambient=float(rng.uniform(0.35, 0.55)),
            light=float(rng.uniform(0.3, 0.6)),
            light_from=tuple(rng.normal((0.1, 0.0, 1.2), (0.4, 0.4, 0.1)).tolist()),
            camera=tuple((np.array(cls.camera) + rng.uniform(-0.02, 0.02, 3)).tolist()),
            camera_at=tuple((np.array(cls.camera_at) + (*rng.uniform(-0.02, 0.02, 2), 0)).tolist()),
            camera_fovy=float(rng.uniform(39, 42)),
            wrist_fovy=float(rng.uniform(67, 73)),
        )


def build(layout: ObjectPositions, look: Look, rng: np.random.Generator) -> mujoco.MjModel:
    """The model with the arm; `rng` draws the texture and the objects' tints. Raises FetchError."""
    spec = arm.spec()
    spec.material("orange").rgba = (*look.arm, 1)
    spec.camera("wrist").fovy = look.wrist_fovy
    furnish(spec, layout, look, rng)
    towards = arm.look_along(np.array(look.camera_at) - np.array(look.camera), (0, 0, 1))
    spec.worldbody.add_camera(name="front", pos=look.camera, quat=towards, fovy=look.camera_fovy)
    return spec.compile()


def furnish(spec: mujoco.MjSpec, layout: ObjectPositions, look: Look, rng: np.random.Generator) -> None:
    """Adds table, light and objects to the model of arm or hand; `rng` draws the texture and the objects' tints."""
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 10
    spec.option.iterations, spec.option.ls_iterations, spec.option.noslip_iterations = 30, 20, 3
    _surroundings(spec, look, rng)
    for thing in layout.things:
        rgb = look.plate if thing.kind == "plate" else COLORS.get(thing.color, (0.9, 0.9, 0.9))
        tinted = color(np.array(rgb) + look.tint * rng.uniform(-1, 1, 3))
        objects.add(spec, thing.name, thing.kind, tinted, thing.position, thing.quaternion)


def _surroundings(spec: mujoco.MjSpec, look: Look, rng: np.random.Generator) -> None:
    visual = spec.visual
    visual.quality.shadowsize = visual.quality.offsamples = 0  # they halve the speed of drawing
    visual.map.znear, visual.map.zfar = 0.01, 10
    visual.headlight.ambient, visual.headlight.diffuse = (look.ambient,) * 3, (0.35,) * 3
    visual.headlight.specular = (0, 0, 0)
    spec.stat.center, spec.stat.extent = (0.2, 0, 0.1), 0.6
    spec.add_texture(
        name="sky",
        type=mujoco.mjtTexture.mjTEXTURE_SKYBOX,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
        rgb1=look.sky,
        rgb2=color(0.65 * np.array(look.sky)),
        width=64,
        height=384,
    )
    texture = spec.add_texture(name="table", type=mujoco.mjtTexture.mjTEXTURE_2D, width=_TEXTURE, height=_TEXTURE)
    texture.nchannel = 3
    texture.data = _pattern(look, rng).tobytes()
    textures = [""] * int(mujoco.mjtTextureRole.mjNTEXROLE)
    textures[int(mujoco.mjtTextureRole.mjTEXROLE_RGB)] = "table"
    spec.add_material(name="table", textures=textures, texrepeat=(3, 3), specular=0.1)
    world = spec.worldbody
    world.add_light(
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        dir=tuple(-v for v in look.light_from),
        diffuse=(look.light,) * 3,
        specular=(0.1,) * 3,
        castshadow=False,
    )
    box, plane = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_PLANE
    world.add_geom(
        name="table",
        type=box,
        size=(0.5, 0.6, 0.02),
        pos=(0.25, 0, -0.02),
        material="table",
        condim=4,
        friction=(1, 0.01, 0.0005),
        solref=(0.006, 1),
        solimp=(0.95, 0.99, 0.001, 0.5, 2),
    )
    world.add_geom(name="floor", type=plane, size=(3, 3, 0.1), pos=(0, 0, -0.7), rgba=(0.55, 0.55, 0.58, 1))


def _pattern(look: Look, rng: np.random.Generator) -> np.ndarray:
    """uint8 [_TEXTURE, _TEXTURE, 3] around the table's colour."""
    y, x = np.meshgrid(*2 * (np.arange(_TEXTURE) / _TEXTURE,), indexing="ij")
    shade: np.ndarray
    if look.pattern == "plain":
        shade = np.zeros_like(x)
    elif look.pattern == "speckle":
        shade = -0.12 * (rng.random(x.shape) < 0.03)
    elif look.pattern == "grain":
        waves, phases = rng.integers(3, 24, 6), rng.uniform(0, 2 * math.pi, 6)
        bend = 0.3 * np.sin(2 * math.pi * y + phases[0])
        shade = 0.03 * sum(np.sin(2 * math.pi * w * x + p + bend) for w, p in zip(waves, phases, strict=True))
    else:
        shade = 0.1 * ((np.floor(4 * x) + np.floor(4 * y)) % 2)
    return np.clip(255 * (np.array(look.table) + shade[..., None]), 0, 255).astype(np.uint8)


def color(rgb: np.ndarray) -> tuple[float, float, float]:
    """Clipped to 0..1."""
    return tuple(np.clip(rgb, 0.0, 1.0).tolist())
