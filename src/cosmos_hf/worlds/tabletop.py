"""The table-top robot world: a ViperX-300s picks, pushes or wanders at 5 Hz, with exact states, actions and camera.

World frame: x away from the robot's base, y to its left, z up, metres. End-effector angles are zero pointing down.
"""

from dataclasses import asdict, dataclass

import numpy as np

from ..conditioning.robot_states import actions_from_states, euler_from_rotation, rotation_from_euler
from .captions import caption
from .render import SegmentationRenderer, make_renderer, mujoco
from .tabletop_scene import SceneSpec, build_model, camera_pose, sample_scene

VERSION = 2  # of the simulated content: raised when equal arguments give other clips
SPLITS = ("train", "val_iid", "val_combo", "val_style", "val_view", "val_counterfactual")
FPS, HEIGHT, WIDTH, NUM_FRAMES, FOV_Y = 5, 96, 128, 33, 48.0
KINDS, KIND_SHARES = ("pick", "push", "random"), (0.45, 0.35, 0.20)
TOLD_SHARES = (0.55, 0.45, 0.0)  # where every clip follows an instruction
# What the arm does in the counterfactual split, from one start state: [x, y, z, roll, pitch, yaw, gripper] a step.
PLANS = {
    "left": (0, 0.03, -0.004, 0, 0, 0, 1),
    "right": (0, -0.03, -0.004, 0, 0, 0, 1),
    "forward and down": (0.03, 0, -0.012, 0, 0, 0, 0),
    "up": (-0.005, 0, 0.03, 0.06, 0, 0, 1),
}

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_HOME = np.array([0, -0.6, 0.9, 0, 1.27, 0])
_DOWN = np.array([[0, 0, 1.0], [0, 1, 0], [-1, 0, 0]])  # orientation of the end-effector site when it points down
_REACH = np.array([-0.08, -0.24, 0.012]), np.array([0.26, 0.24, 0.32])
_FINGER_CLOSED, _FINGER_STROKE = 0.021, 0.036


@dataclass
class Episode:
    """One simulated clip of T frames; the units are those of the module's docstring."""

    scene: SceneSpec
    kind: str
    caption: str
    frames: np.ndarray  # uint8 [T, H, W, 3]
    states: np.ndarray  # [T, 7] end-effector
    actions: np.ndarray  # [T - 1, 7] derived from the states
    commands: np.ndarray  # [T - 1, 7] what the policy asked for
    object_positions: np.ndarray  # [T, N, 3]
    intrinsics: np.ndarray  # [3, 3] pixels; a pixel's centre is at + 0.5
    extrinsics: np.ndarray  # [T, 4, 4] world to camera, OpenCV axes
    target: int  # the object that the policy is after
    masks: np.ndarray | None = None  # uint8 [T, H, W]: 0 background, 1 arm, 2 + i object i
    plan: str | None = None  # counterfactual split only

    def videos(self) -> dict[str, np.ndarray]:
        return {"": self.frames}

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("actions", "commands", "states", "intrinsics", "extrinsics", "object_positions")
        arrays = {name: getattr(self, name).astype(np.float32) for name in names}
        return arrays | ({} if self.masks is None else {"masks": self.masks})

    def record(self) -> dict:
        told = {name: getattr(self, name) for name in ("caption", "kind", "plan", "target")}
        return told | {"scene": asdict(self.scene)}


class Robot:
    """The simulated arm: commands in, states out. Inverse kinematics by damped least squares on position servos."""

    def __init__(self, model):
        self.model, self.data, self._scratch = model, mujoco.MjData(model), mujoco.MjData(model)
        joints = [model.joint(name) for name in _JOINTS]
        self._qpos = np.array([joint.qposadr[0] for joint in joints])
        self._dofs = np.array([joint.dofadr[0] for joint in joints])
        self._low, self._high = model.jnt_range[[joint.id for joint in joints]].T
        self._site = model.site("end_effector").id
        self._left, self._right = (model.joint(f"{side}_finger").qposadr[0] for side in ("left", "right"))
        self._num_objects = sum(model.body(i).name.startswith("object") for i in range(model.nbody))
        self.data.qpos[self._qpos] = _HOME
        self.data.qpos[self._left], self.data.qpos[self._right] = 0.057, -0.057
        self._goal_joints, self._gripper = _HOME.copy(), 1.0
        mujoco.mj_forward(model, self.data)
        self.goal, self._goal_rotation = self._pose()
        self._straight_down = self._goal_rotation.copy()
        for _ in range(50):  # settle
            self._hold()
            mujoco.mj_step(model, self.data)

    def _pose(self) -> tuple[np.ndarray, np.ndarray]:
        return self.data.site_xpos[self._site].copy(), self.data.site_xmat[self._site].reshape(3, 3).copy()

    def state(self) -> np.ndarray:
        """[x, y, z, roll, pitch, yaw, gripper]; the gripper is 0 closed to 1 open."""
        position, rotation = self._pose()
        # The mean of both fingers, since contacts drag the pair to one side; the servos also yield past their limits.
        opening = (self.data.qpos[self._left] - self.data.qpos[self._right]) / 2
        gripper = np.clip((opening - _FINGER_CLOSED) / _FINGER_STROKE, 0, 1)
        return np.concatenate([position, euler_from_rotation(rotation @ _DOWN.T), [gripper]])

    def object_positions(self) -> np.ndarray:
        return np.array([self.data.body(f"object{i}").xpos for i in range(self._num_objects)])

    def put_object(self, index: int, position: np.ndarray):
        """Set the place [3] of an object, in metres in the world; no time passes."""
        address = self.model.jnt_qposadr[self.model.body(f"object{index}").jntadr[0]]
        self.data.qpos[address : address + 3] = position
        mujoco.mj_forward(self.model, self.data)

    def put_hand(self, position: np.ndarray, gripper: float):
        """Set the place [3] of the gripper, which points straight down, and its opening, 0 closed to 1 open; no time passes.

        Out of reach it comes as near as it can.
        """
        self._goal_joints, _ = self._solve(position, self._straight_down, iterations=40)
        self._gripper = gripper
        self.data.qpos[self._qpos] = self._goal_joints
        opening = _FINGER_CLOSED + _FINGER_STROKE * gripper
        self.data.qpos[self._left], self.data.qpos[self._right] = opening, -opening
        mujoco.mj_forward(self.model, self.data)

    def _hold(self):
        opening = _FINGER_CLOSED + _FINGER_STROKE * self._gripper
        self.data.ctrl[:] = [*self._goal_joints, opening, -opening]

    def step(self, command: np.ndarray):
        """Advance one frame. Command: [dx, dy, dz, droll, dpitch, dyaw] in the base frame, and the gripper, 1 open."""
        old_goal, old_rotation, start = self.goal, self._goal_rotation, self._goal_joints
        goal = np.clip(self.goal + command[:3], *_REACH)
        rotation = rotation_from_euler(command[3:6]) @ self._goal_rotation
        tilt = np.arccos(np.clip((np.trace(rotation @ self._straight_down.T) - 1) / 2, -1, 1))
        if tilt > 0.6:  # near the singularity of a horizontal wrist
            rotation = old_rotation
        end, residual = self._solve(goal, rotation)
        if residual > 0.004:  # out of reach: hold still
            goal, rotation, end = old_goal, old_rotation, start
        end = start + np.clip(end - start, -0.35, 0.35)
        self._gripper = float(np.clip(command[6], 0, 1))
        substeps = round(1 / FPS / self.model.opt.timestep)
        for i in range(substeps):
            self._goal_joints = start + (end - start) * min(1, (i + 1) / (0.8 * substeps))
            self._hold()
            mujoco.mj_step(self.model, self.data)
        # The goal may not run away from what the arm reached.
        reached, _ = self._pose()
        self.goal, self._goal_rotation = reached + np.clip(goal - reached, -0.03, 0.03), rotation

    def _solve(self, position, rotation, iterations: int = 8) -> tuple[np.ndarray, float]:
        """Joint angles [6] that reach a pose, and the distance that is left (m); kinematics on a scratch state."""
        scratch, model, joints = self._scratch, self.model, self._goal_joints.copy()
        scratch.qpos[:] = self.data.qpos
        jacobians = np.zeros((2, 3, model.nv))
        for _ in range(iterations):
            scratch.qpos[self._qpos] = joints
            mujoco.mj_kinematics(model, scratch)
            mujoco.mj_comPos(model, scratch)
            mujoco.mj_jacSite(model, scratch, jacobians[0], jacobians[1], self._site)
            jacobian = jacobians.reshape(6, -1)[:, self._dofs]
            off = rotation @ scratch.site_xmat[self._site].reshape(3, 3).T
            turn = np.array([off[2, 1] - off[1, 2], off[0, 2] - off[2, 0], off[1, 0] - off[0, 1]]) / 2
            error = np.concatenate([position - scratch.site_xpos[self._site], turn])
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
            joints = np.clip(joints + np.clip(step, -0.15, 0.15), self._low, self._high)
        scratch.qpos[self._qpos] = joints
        mujoco.mj_kinematics(model, scratch)
        return joints, float(np.linalg.norm(position - scratch.site_xpos[self._site]))


class Policy:
    """Scripted behaviour: `pick` and put down, `push` along an axis, or `random` motion that seeks an object."""

    def __init__(self, robot: Robot, kind: str, rng: np.random.Generator, target: int | None = None):
        self.robot, self.kind, self.rng = robot, kind, rng
        drawn = int(rng.integers(len(robot.object_positions())))
        self.target = drawn if target is None else target
        self.phase = self._time = 0
        self._put_down = np.array([rng.uniform(0, 0.19), rng.uniform(-0.17, 0.17)])
        axis, sign = rng.integers(2), rng.choice([-1.0, 1.0])
        along = np.eye(2)[axis] * sign
        place = robot.object_positions()[self.target][:2]
        self._push_start, self._push_end = place - 0.075 * along, place + 0.10 * along
        self._velocity, self._wanted, self._grip = np.zeros(6), np.zeros(6), 1.0

    def command(self) -> np.ndarray:
        """The next command of `Robot.step` [7]."""
        move = getattr(self, f"_{self.kind}")()
        if self.kind != "random":
            move[:6] += self.rng.normal(0, 1, 6) * [0.002, 0.002, 0.002, 0.01, 0.01, 0.01]
        self._time += 1
        return move

    def _towards(self, x, y, z, tolerance: float, gripper: float, speed: float = 0.045) -> np.ndarray:
        """Move towards a point; the next phase begins when it is near."""
        offset = np.array([x, y, z]) - self.robot.goal
        distance = np.linalg.norm(offset)
        self.phase += int(distance < tolerance)
        return np.concatenate([offset * min(1, speed / (distance + 1e-9)), np.zeros(3), [gripper]])

    def _wait(self, gripper: float) -> np.ndarray:
        self.phase += 1
        return np.array([0, 0, 0, 0, 0, 0, gripper])

    def _pick(self) -> np.ndarray:
        here, thing = self.robot.goal, self.robot.object_positions()[self.target]
        match self.phase:
            case 0:
                return self._towards(thing[0], thing[1], 0.12, 0.012, 1.0)
            case 1:
                return self._towards(thing[0], thing[1], max(0.018, thing[2] - 0.004), 0.006, 1.0)
            case 2 | 3:
                return self._wait(0.0)
            case 4:
                return self._towards(here[0], here[1], 0.16, 0.012, 0.0)
            case 5:
                return self._towards(*self._put_down, 0.16, 0.01, 0.0)
            case 6:
                return self._towards(*self._put_down, 0.045, 0.006, 0.0)
            case 7:
                return self._wait(1.0)
            case _:
                return self._towards(here[0], here[1], 0.18, 0, 1.0)

    def _push(self) -> np.ndarray:
        here = self.robot.goal
        match self.phase:
            case 0:
                return self._towards(*self._push_start, 0.12, 0.012, 0.0)
            case 1:
                return self._towards(*self._push_start, 0.025, 0.006, 0.0)
            case 2:
                return self._towards(*self._push_end, 0.025, 0.006, 0.0, speed=0.03)
            case _:
                return self._towards(here[0], here[1], 0.16, 0, 0.0)

    def _random(self) -> np.ndarray:
        here = self.robot.goal
        at_edge = abs(here[1]) > 0.2 or not -0.06 < here[0] < 0.23
        if self._time % 6 == 0 or at_edge:
            self._wanted = np.concatenate([self.rng.normal(0, 0.025, 3), self.rng.normal(0, 0.06, 3)])
            self._grip = float(self.rng.random() < 0.6)
        self._velocity = 0.5 * self._velocity + 0.5 * self._wanted
        pull = self.robot.object_positions()[self.target] - here
        pull[2] = 0.03 - here[2]
        return np.concatenate([self._velocity[:3] + 0.12 * pull, self._velocity[3:], [self._grip]])


def simulate(
    split: str,
    index: int,
    seed: int = 0,
    renderer: str | None = "filament",
    masks: bool = False,
    turns: int = 0,
) -> Episode:
    """Clip `index` of a split, a pure function of its arguments but for Filament's dithering (`render.restart_filament`).

    `renderer`: "filament", "classic", or None for no pictures (frames of zeros). `masks`: render the segmentation too.
    `turns`: pick or push in every clip, of which so many in a row are of one scene and take its objects in turn, and tell it
    as an instruction (`tabletop_instructions`).
    """
    plan = None
    scene_index, turn = divmod(index, turns) if turns else (index, 0)
    if split == "val_counterfactual":
        scene_index, plan_index = divmod(index, len(PLANS))
        plan = list(PLANS)[plan_index]
    rng = np.random.default_rng([seed, *split.encode(), scene_index])
    scene = sample_scene(rng, split)
    target = None
    if turns:
        target = int(rng.permutation(len(scene.objects))[turn % len(scene.objects)])
        rng = np.random.default_rng([seed, *split.encode(), scene_index, turn])
    if split == "val_combo":
        target = 0  # the held-out pair
    model = build_model(scene)
    robot = Robot(model)
    kind = "plan" if plan else str(rng.choice(KINDS, p=TOLD_SHARES if turns else KIND_SHARES))
    policy = None if plan else Policy(robot, kind, rng, target)
    take = Camera(model, renderer, masks)
    take.picture(robot)
    commands = []
    for step in range(NUM_FRAMES - 1):
        command = _planned(plan, step) if plan else policy.command()
        robot.step(command)
        commands.append(command)
        take.picture(robot)
    states, positions = np.array(take.states), np.array(take.positions)
    target = policy.target if policy else 0
    return Episode(
        scene=scene,
        kind=kind,
        caption=caption(
            scene, kind, target, positions, states[:, :3], camera_pose(scene)[1], rng, instruct=bool(turns)
        ),
        frames=np.array(take.frames),
        states=states,
        actions=actions_from_states(states),
        commands=np.array(commands),
        object_positions=positions,
        intrinsics=intrinsics(),
        extrinsics=np.repeat(world_to_camera(scene)[None], NUM_FRAMES, axis=0),
        target=target,
        masks=np.array(take.masks) if masks else None,
        plan=plan,
    )


def _planned(plan: str, step: int) -> np.ndarray:
    """Nine steps of the plan, then hold still."""
    command = np.array(PLANS[plan], dtype=float)
    if step >= 9:
        command[:6] = 0
    return command


def intrinsics() -> np.ndarray:
    focal = HEIGHT / 2 / np.tan(np.radians(FOV_Y) / 2)
    return np.array([[focal, 0, WIDTH / 2], [0, focal, HEIGHT / 2], [0, 0, 1]])


def world_to_camera(scene: SceneSpec) -> np.ndarray:
    eye, axes = camera_pose(scene)
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = axes, -axes @ eye
    return matrix


class Camera:
    """Collects pictures, masks, states and object positions of an episode as it goes."""

    def __init__(self, model, renderer: str | None, masks: bool):
        self._render = make_renderer(renderer, model, HEIGHT, WIDTH).render if renderer else None
        self._segment = SegmentationRenderer(model, HEIGHT, WIDTH).render if masks else None
        self._class_of_geom = np.array([_class_of(model, model.geom_bodyid[i]) for i in range(model.ngeom)] + [0])
        self.frames, self.masks, self.states, self.positions = [], [], [], []

    def picture(self, robot: Robot):
        blank = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        self.frames.append(self._render(robot.data, "main") if self._render else blank)
        if self._segment:
            self.masks.append(self._class_of_geom[self._segment(robot.data, "main")].astype(np.uint8))
        self.states.append(robot.state())
        self.positions.append(robot.object_positions().copy())


def _class_of(model, body: int) -> int:
    """0 background, 1 arm, 2 + i object i."""
    name = model.body(model.body_rootid[body]).name
    if name.startswith("object"):
        return 2 + int(name.removeprefix("object"))
    return int(name == "vx300s")
