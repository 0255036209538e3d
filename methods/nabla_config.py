"""Options of the ∇-GFlowNet family, and which of them go together."""

from typing import Literal

from pydantic import Field, model_validator

from bench import Config


class NablaConfig(Config):
    """Options of the ∇-GFlowNet family; symbols as in `methods.nabla_gfn.NablaGFN`."""

    residual: bool = Field(True, description="residual ∇-DB (target p_# exp(βr)); false: plain ∇-DB (target exp(βr))")
    flow: bool = Field(True, description="train g_φ; false keeps the forward loss alone")
    fraction: float = Field(0.1, ge=0, le=1, description="transitions besides the last (one at least), over K; 0: none")
    gamma: Literal["alpha", "sqrt_alpha", "one"] = Field("alpha", description="γ_k of the forward-looking term")
    weighting: Literal["score", "kl"] = Field("kl", description="'kl' multiplies transition losses by σ_k²")
    detach_target: bool = Field(True, description="keep the forward loss's gradient out of g_φ")
    flow_target: Literal["policy", "adjoint"] = Field(
        "policy", description="what g_φ regresses on: the policy's reverse score, or the lean adjoint (our variant)"
    )
    reverse: Literal["pathwise", "expected"] = Field("expected", description="the reverse score, or its mean on-policy")
    reverse_at: Literal["start", "end"] = Field(
        "end", description="where in a transition g_φ learns: at z_k, or at z_{k+1}, which takes fewer passes"
    )
    reverse_weight: float = Field(1.0, ge=0, description="w_B")
    trust: float = Field(0.0, ge=0, description="λ of the trust region")
    channels: list[int] = Field([64, 128, 256, 256], description="widths of the flow network g_φ")

    @model_validator(mode="after")
    def _expected_needs_prior(self) -> "NablaConfig":
        if self.reverse == "expected" and not self.residual:
            raise ValueError("reverse: expected is the mean of the residual score; use residual: true, or pathwise")
        if self.flow_target == "adjoint" and not (self.residual and self.flow):
            raise ValueError("flow_target: adjoint is the residual flow's; use residual: true and flow: true")
        shared = self.detach_target and (self.reverse, self.flow_target) == ("expected", "policy")
        if self.flow and self.reverse_at == "end" and not shared:
            raise ValueError(
                "reverse_at: end is for a detached target in expectation; use reverse_at: start, or detach_target: "
                "true, flow_target: policy and reverse: expected"
            )
        return self
