// The panel as NiceGUI knows it: one string with everything at first, then what is new.
import { Panel } from "trainer-panel";

export default {
  template: '<div class="panel"></div>',
  props: { data: String },
  mounted() {
    this.panel = new Panel(this.$el, JSON.parse(this.data), (name, values) => this.$emit(name, values));
  },
  unmounted() {
    this.panel.close();
  },
  methods: {
    take(name, ...values) {
      this.panel[name](...values);
    },
  },
};
