"""How it looks, dark and light, and the keys: Ctrl+Enter runs the open tab, Esc stops."""

from __future__ import annotations

import gradio as gr

RUN, STOP = "lp-run", "lp-stop"  # classes of the buttons that the keys press
SAID = "lp-said"  # class of the places where a tab says how it goes


def into_view(*names: str) -> str:
    """JavaScript that scrolls to the first of these elements that there is, by id."""
    found = " || ".join(f"document.querySelector('#{name}')" for name in names)
    return f"() => setTimeout(() => {{ const at = {found}; if (at) at.scrollIntoView({{block: 'center'}}); }}, 400)"


CSS = """
.gradio-container { width: 100%; max-width: min(1280px, 100vw) !important; margin: 0 auto !important; }
.gradio-container, .gradio-container .main, .gradio-container main, .gradio-container .wrap { min-width: 0 !important; }
.gradio-container main, .gradio-container .wrap { width: 100%; }
.dark { --color-accent: var(--primary-300); }
.lp-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem; padding: .25rem 0; }
.lp-head h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; margin: 0; color: var(--body-text-color); }
.lp-head p { margin: 0; color: var(--body-text-color-subdued); }
.lp-light { display: inline-flex; gap: .5rem; align-items: baseline; color: var(--body-text-color); }
.lp-light::before { content: ""; flex: none; width: .7rem; height: .7rem; border-radius: 50%; background: #888; }
.lp-green::before { background: #1a9850; } .lp-amber::before { background: #e08e0b; } .lp-red::before { background: #d73027; }
.lp-wait::before { background: #4575b4; }
.lp-status { min-height: 1.6rem; color: var(--body-text-color); overflow-wrap: anywhere; }
.lp-status progress { width: 100%; height: .5rem; accent-color: var(--color-accent); }
.lp-status img { display: block; width: min(100%, 24rem); aspect-ratio: 1; margin: .5rem auto; border-radius: var(--radius-lg);
  image-rendering: auto; }
.lp-status p { margin: .25rem 0; }
.lp-empty { border: 1px dashed var(--border-color-primary); border-radius: var(--radius-lg); padding: 2.5rem 1rem;
  text-align: center; color: var(--body-text-color-subdued); }
.lp-wide > *, .lp-wide .block, .lp-wide .html-container { min-width: 0 !important; max-width: 100%; }
.lp-table { overflow-x: auto; max-width: 100%; }
.lp-table table { border: 0 !important; border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.lp-table th, .lp-table td { text-align: left; padding: .35rem .75rem .35rem 0 !important; vertical-align: top;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; color: var(--body-text-color); }
.lp-table tr, .lp-table thead, .lp-table tbody { border: 0 !important; }
.lp-table caption { text-align: left; color: var(--body-text-color-subdued); padding-bottom: .25rem; }
.lp-pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; }
.lp-pictures figure { margin: 0; } .lp-pictures img { width: 100%; border-radius: var(--radius-md); }
.lp-pictures figcaption { font-size: .85rem; color: var(--body-text-color-subdued); }
.lp-grid { display: grid !important; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); grid-template-rows: auto 1fr; }
.lp-grid > :nth-child(2) { grid-row: span 2; }
.lp-tight { gap: .5rem !important; }
#lp-gallery .grid-wrap { max-height: none; height: auto; min-height: 0; overflow: visible; }
#lp-gallery .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; padding: 0; }
#lp-gallery img { max-height: 26rem; }
.thumbnail-item { height: auto !important; aspect-ratio: auto !important; display: flex !important; flex-direction: column; }
.thumbnail-item img { width: 100%; aspect-ratio: 1; flex: none; object-fit: contain !important; }
.thumbnail-item .caption-label { position: static !important; max-width: 100% !important; width: 100%; border: 0 !important;
  border-radius: 0 !important; text-align: left; padding: .6rem .6rem .5rem !important; }
#lp-history .caption-label { display: none; }
#lp-history .grid-wrap { padding-top: 1.9rem; } /* below the label */
#lp-history .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)) !important; }
.image-container .image-frame { padding-top: 1.9rem; box-sizing: border-box; } /* below the label */
.lp-large img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
footer { flex-wrap: wrap; }
@media (max-width: 760px) {
  .gradio-container { padding: .5rem !important; }
  .lp-wide { flex-direction: column !important; }
  .lp-wide > * { width: 100%; min-width: 0 !important; }
  #lp-history .grid-container, #lp-grid-single .grid-container {
    grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)) !important; }
  #lp-gallery img { max-height: none; }
  .lp-head p { display: none; }
  #lp-tabs .tab-container button, #lp-tabs .tab-wrapper button { padding: 0 .35rem; font-size: .8rem; }
  .lp-grid { grid-template-columns: minmax(0, 1fr); }
  .lp-grid > :nth-child(2) { grid-row: auto; }
}
"""

KEYS = """
<style>
.toast-wrap { max-height: 45vh; overflow-y: auto; }
@media (max-width: 760px) {
  .toast-wrap.toast-wrap { top: auto !important; bottom: .5rem; left: .5rem !important; right: .5rem !important;
    width: auto !important; max-height: 30vh; }
  .toast-body.toast-body { font-size: .85rem; }
  .toast-header.toast-header { padding: .25rem .5rem; } .toast-message-item.toast-message-item { padding: .25rem .75rem; }
}
</style>
<script>
(() => {
  const press = (name) => {
    for (const box of document.querySelectorAll("." + name)) {
      const button = box.matches("button") ? box : box.querySelector("button");
      if (button && button.offsetParent !== null && !button.disabled) { button.click(); return true; }
    }
    return false;
  };
  // gradio leaves pictures without words, and names thumbnails by their number alone
  const name = () => {
    for (const image of document.querySelectorAll("img:not([alt]), img[alt='']")) {
      const block = image.closest(".block");
      const label = block && block.querySelector("label, [data-testid=block-label]");
      image.alt = (label && label.innerText.trim()) || "picture";
    }
    for (const button of document.querySelectorAll("button[aria-label]")) {
      const words = button.innerText.trim();
      const label = button.getAttribute("aria-label");
      if (words && !label.toLowerCase().includes(words.toLowerCase())) button.setAttribute("aria-label", label + ": " + words);
    }
  };
  let due = false;
  new MutationObserver(() => {
    if (!due) { due = true; setTimeout(() => { due = false; name(); }, 150); }
  }).observe(document, { childList: true, subtree: true });
  // on a narrow page what comes of a click stands below the fold: scroll to where the tab says how it goes
  document.addEventListener("click", (event) => {
    const run = event.target.closest && event.target.closest(".lp-run");
    if (!run || window.innerWidth > 760) return;
    const panel = run.closest("[role=tabpanel]") || document;
    const said = [...panel.querySelectorAll(".lp-said")].find((each) => each.offsetParent !== null);
    if (said) setTimeout(() => said.scrollIntoView({ behavior: "smooth", block: "start" }), 200);
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      if (press("lp-run")) { event.preventDefault(); event.stopPropagation(); }
    } else if (event.key === "Escape") { press("lp-stop"); }
  }, true);
})();
</script>
"""


def theme() -> gr.themes.Base:
    """Calm and local: system fonts only, so that nothing is fetched."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", radius_size="md", spacing_size="md", font=fonts, font_mono=mono
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        color_accent="*primary_700",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
