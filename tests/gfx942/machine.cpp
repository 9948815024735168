// An interpreter of AMD CDNA3 (gfx942) code: the launch of a grid of workgroups.
#include <cfenv>
#include <memory>

#include "instructions.h"

static void start(Wave& w, const Launch& launch, const u32* workgroup) {
    w.next = launch.code + launch.entry, w.epoch = 1, w.scc = 0, w.steps = 0;
    w.done = w.waiting = w.scalar_loads = false;
    w.vm.clear(), w.lgkm.clear();
    std::fill_n(w.v_pending, 512, -1), std::fill_n(w.s_pending, 128, -1);
    std::fill_n(w.v[0], 512 * LANES, POISON), std::fill_n(w.s, 128, POISON);
    u32* free = std::copy_n(launch.user, launch.user_size, w.s);
    for (int k = 0; k < 3; k++)
        if (launch.identity[k]) *free++ = workgroup[k];
    const int lanes = std::min<int>(LANES, launch.threads - LANES * w.number);
    w.set_pair(EXEC, ~0ull >> (LANES - lanes));
    EACH w.v[0][l] = LANES * w.number + l;
}
static void step(Wave& w, const Launch& launch) {
    w.now = w.next++;
    launch.count[w.now - launch.code]++;
    operations[w.now->operation](w, *w.now);
    if (++w.steps > launch.most_steps) w.found(ENDLESS);
}
static void run_workgroup(Machine& m, std::vector<std::unique_ptr<Wave>>& waves) {
    const Launch& launch = m.launch;
    auto runs = [&](const Wave& w) { return !w.done && !w.waiting && !m.failed; };
    for (bool alive = true; alive && !m.failed;) {
        for (bool any = true; any;) {
            any = false;
            for (size_t k = 0; k < waves.size(); k++) {
                Wave& w = *waves[launch.order == 1 ? waves.size() - 1 - k : k];
                for (bool more = runs(w); more; more = runs(w) && launch.order != 2) step(w, launch), any = true;
            }
        }
        alive = false;  // all should wait at the same barrier, or be done
        for (auto& w : waves) {
            if (!m.failed && w->now != waves[0]->now && w->done + waves[0]->done < 2)
                w->found(WAVES_AT_DIFFERENT_BARRIERS);
            alive |= !w->done, w->waiting = false, w->epoch++;
        }
    }
}

extern "C" int operation_number(const char* name) {
    if (operations.empty()) define_all();
    auto it = numbers.find(name);
    return it == numbers.end() ? -1 : it->second;
}
extern "C" int run(const Launch* given) {
    const Launch& launch = *given;
    std::fenv_t environment;
    std::fegetenv(&environment), std::fesetenv(FE_DFL_ENV);
    Machine m{launch, {{{0, launch.lds}, 0, LDS_RACE, LDS_NOT_WAITED_FOR_BEFORE_THE_BARRIER, {}}}, {}, {}, 0, 0, false};
    for (const Region* r = launch.watched; r < launch.watched + launch.watched_size; r++)
        m.shadows.push_back(
            {*r, 1, RACE, NOT_WAITED_FOR_BEFORE_THE_BARRIER, std::vector<Cell>((r->high - r->low) / 2 + 2)});
    std::vector<std::unique_ptr<Wave>> waves((launch.threads + LANES - 1) / LANES);
    for (auto& w : waves) w.reset(new Wave()), w->number = int(&w - waves.data()), w->machine = &m;
    const u32* grid = launch.grid;
    for (u32 all = grid[0] * grid[1] * grid[2], n = 0; n < all && !m.failed; n++) {
        const u32 workgroup[] = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
        m.workgroup = int(n), m.records.clear(), m.lds.resize(launch.lds);
        m.shadows[0].cells.assign(launch.lds, Cell());
        for (u32 k = 0; k < launch.lds; k++) m.lds[k] = u8(POISON >> 8 * (k & 3));
        for (auto& w : waves) start(*w, launch, workgroup);
        run_workgroup(m, waves);
    }
    std::fesetenv(&environment);
    return m.findings;
}
