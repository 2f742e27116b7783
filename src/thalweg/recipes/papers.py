"""The twenty-seven papers that the library is built from, and the room of the house that each lives in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Paper:
    """One paper.

    Args:
        number: 1 .. 27, the NN of recipes, runs and results.
        short_name: the rest of their names, for example "stochastic_neurons".
        title: as printed; the first title where a paper has changed it.
        authors: surnames in order, or empty where we could not establish them.
        year: of the publication that `venue` names, else of the preprint.
        venue: journal or conference, or empty for a preprint.
        arxiv: identifier of the preprint.
        rooms: where its methods live in the library.
    """

    number: int
    short_name: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    rooms: tuple[str, ...]

    @property
    def name(self) -> str:
        """Number and short name, as in the names of runs and results: "06_stochastic_neurons"."""
        return f"{self.number:02d}_{self.short_name}"


PAPERS: tuple[Paper, ...] = (
    Paper(
        1,
        "gradient_balance",
        "Understanding and mitigating gradient (flow) pathologies in physics-informed neural networks",
        "Wang, Teng, Perdikaris",
        2021,
        "SIAM J. Sci. Comput. 43(5)",
        "2001.04536",
        (
            "balancing",
            "networks/gated_mlp",
            "jets",
        ),
    ),
    Paper(
        2,
        "selavpr",
        "SelaVPR++: Towards Seamless Adaptation of Foundation Models for Efficient Place Recognition",
        "",
        2026,
        "IEEE TPAMI 48(3)",
        "2502.16601",
        (
            "side/multiconv",
            "side/hashing",
        ),
    ),
    Paper(
        3,
        "caption_attack",
        "Controlled Caption Generation for Images Through Adversarial Attacks",
        "Aafaq, Akhtar, Liu, Shah, Mian",
        2021,
        "",
        "2107.03050",
        ("attacks/feature_generator",),
    ),
    Paper(
        4,
        "unipt",
        "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory",
        "",
        2024,
        "CVPR",
        "2308.14316",
        (
            "side/taps",
            "side/parallel",
        ),
    ),
    Paper(
        5,
        "text2grad",
        "Text2Grad: Reinforcement Learning from Natural Language Feedback",
        "Wang, Wang, Zhang, Mao, Qin, Lin, Rajmohan, Zhang",
        2026,
        "ICLR",
        "2505.22338",
        ("feedback",),
    ),
    Paper(
        6,
        "stochastic_neurons",
        "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
        "Bengio, Léonard, Courville",
        2013,
        "",
        "1308.3432",
        ("stochastic",),
    ),
    Paper(
        7,
        "equilibrium_propagation",
        "Equilibrium Propagation: Bridging the Gap Between Energy-Based Models and Backpropagation",
        "Scellier, Bengio",
        2017,
        "Frontiers in Comp. Neuroscience",
        "1602.05179",
        ("equilibria/energy",),
    ),
    Paper(
        8,
        "caa_policy",
        "End-to-End Visual Autonomous Parking via Control-Aided Attention",
        "",
        2025,
        "",
        "2509.11090",
        ("explain/control_attention",),
    ),
    Paper(
        9,
        "forward_gnn",
        "Forward Learning of Graph Neural Networks",
        "Park et al.",
        2024,
        "ICLR",
        "2403.11004",
        (
            "local/forward_forward",
            "local/graph",
        ),
    ),
    Paper(
        10,
        "bidirectional_learning",
        "Bidirectional Learning for Robust Neural Networks",
        "Pontes-Filho, Liwicki",
        2019,
        "IJCNN",
        "1805.08006",
        (
            "local/bidirectional",
            "attacks/pgd",
        ),
    ),
    Paper(
        11,
        "pixelwise_gradient_clipping",
        "Enhancing High-Resolution 3D Generation through Pixel-wise Gradient Clipping",
        "",
        2024,
        "ICLR",
        "2310.12474",
        ("gates/clip",),
    ),
    Paper(
        12,
        "noprop",
        "NoProp: Training Neural Networks without Back-propagation or Forward-propagation",
        "Li, Teh, Pascanu",
        2025,
        "",
        "2503.24322",
        ("local/noprop",),
    ),
    Paper(
        13,
        "normgrad_saliency",
        "There and Back Again: Revisiting Backpropagation Saliency Methods",
        "Rebuffi, Fong, Ji, Vedaldi",
        2020,
        "CVPR",
        "2004.02866",
        (
            "explain/saliency",
            "probes",
        ),
    ),
    Paper(
        14,
        "li2_grokking",
        "Provable Scaling Laws of Feature Emergence from Learning Dynamics of Grokking",
        "Tian",
        2025,
        "",
        "2509.21519",
        ("explain/features",),
    ),
    Paper(
        15,
        "zeroth_order",
        "A Unified Perspective on Optimization in Machine Learning and "
        "Neuroscience: From Gradient Descent to Neural Adaptation",
        "García Fernández, Ahmad, van Gerven",
        2025,
        "",
        "2510.18812",
        ("blackbox",),
    ),
    Paper(
        16,
        "flowchef",
        "Steering Rectified Flow Models in the Vector Field for Controlled Image Generation",
        "",
        2025,
        "ICCV",
        "2412.00100",
        (
            "flows/steering",
            "rollouts/route",
        ),
    ),
    Paper(
        17,
        "alignprop",
        "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
        "",
        2023,
        "",
        "2310.03739",
        (
            "flows/reward",
            "rollouts",
        ),
    ),
    Paper(
        18,
        "born_taylor",
        "A Neural Network Perturbation Theory Based on the Born Series",
        "Kaspschak, Meißner",
        2021,
        "Phys. Rev. Research 3, 023223",
        "2009.03192",
        (
            "jets",
            "explain/taylor",
        ),
    ),
    Paper(
        19,
        "maid_bilevel",
        "An adaptively inexact first-order method for bilevel optimization "
        "with application to hyperparameter learning",
        "Salehi, Mukherjee, Roberts, Ehrhardt",
        2023,
        "SIAM J. Math. Data Sci.",
        "2308.10098",
        ("equilibria/bilevel",),
    ),
    Paper(
        20,
        "langevin_averaging",
        "Improved high-dimensional estimation with Langevin dynamics and stochastic weight averaging",
        "Wei, Damian, Lee",
        2026,
        "ICLR",
        "2603.06028",
        ("optim/langevin",),
    ),
    Paper(
        21,
        "dm0_insulated_vla",
        "DM0: An Embodied-Native Vision-Language-Action Model towards Physical AI",
        "",
        2026,
        "",
        "2602.14974",
        ("side/insulate",),
    ),
    Paper(
        22,
        "adjoint_dpm",
        "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation "
        "of Diffusion Probabilistic Models",
        "",
        2024,
        "ICLR",
        "2307.10711",
        (
            "flows/field",
            "rollouts/ode",
        ),
    ),
    Paper(
        23,
        "diffusion_principles",
        "The Principles of Diffusion Models",
        "Lai, Song, Kim, Mitsufuji, Ermon",
        2025,
        "",
        "2510.21890",
        (
            "flows/path",
            "flows/field",
            "flows/samplers",
            "flows/guidance",
            "flows/maps",
        ),
    ),
    Paper(
        24,
        "rectified_flow",
        "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        "Liu, Gong, Liu",
        2023,
        "ICLR",
        "2209.03003",
        ("flows/rectified",),
    ),
    Paper(
        25,
        "wasserstein_flow_matching",
        "Are We Really Learning the Score Function? Reinterpreting Diffusion "
        "Models Through Wasserstein Gradient Flow Matching",
        "Vuong, McCann, Santos, Lin",
        2025,
        "TMLR",
        "2509.00336",
        ("flows/conservative",),
    ),
    Paper(
        26,
        "convex_relu",
        "Efficient Global Optimization of Two-layer ReLU Networks: Quadratic-time "
        "Algorithms and Adversarial Training",
        "Bai, Gautam, Sojoudi",
        2023,
        "SIAM J. Math. Data Sci. 5(2)",
        "2201.01965",
        ("convex",),
    ),
    Paper(
        27,
        "deep_conjugate_direction",
        "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
        "Kaneda, Akar, Chen, Kala, Hyde, Teran",
        2023,
        "ICML",
        "2205.10763",
        (
            "linear",
            "networks/grid_unet",
        ),
    ),
)
