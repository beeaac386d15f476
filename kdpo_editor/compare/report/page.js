
// A prompt is shown where all words that were typed stand in it or its answers.
for (const box of document.querySelectorAll("input[type=search]")) {
  const around = box.closest("details");
  let prompts = null;
  box.addEventListener("input", () => {
    prompts ??= [...around.querySelectorAll(".asked")].map((at) => [at, at.textContent.toLowerCase()]);
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [at, text] of prompts) {
      at.hidden = !words.every((word) => text.includes(word));
      shown += !at.hidden;
    }
    around.querySelector("output").textContent = words.length ? `${shown} of ${prompts.length} prompts` : "";
  });
}
