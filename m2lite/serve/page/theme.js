/* Dark, light, or as the system has it. Runs before anything is drawn, so that the page does not flash. */
"use strict";

(() => {
  const THEMES = ["system", "dark", "light"];
  const root = document.documentElement;

  function stored() {
    try {
      return localStorage.getItem("m2lite-theme");
    } catch {
      return null; // storage is forbidden here
    }
  }

  function set(theme) {
    root.dataset.theme = THEMES.includes(theme) ? theme : "system";
    const button = document.getElementById("theme");
    if (button) {
      button.title = `Theme: ${root.dataset.theme}`;
      button.setAttribute("aria-label", button.title);
    }
    document.dispatchEvent(new Event("theme"));
  }

  function next() {
    const theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
    set(theme);
    try {
      localStorage.setItem("m2lite-theme", theme);
    } catch {
      // it is forgotten with the page
    }
  }

  set(stored());
  document.addEventListener("DOMContentLoaded", () => {
    set(root.dataset.theme);
    document.getElementById("theme").addEventListener("click", next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => set(root.dataset.theme));
})();
