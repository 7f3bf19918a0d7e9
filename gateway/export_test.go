package gateway

import "time"

// Matcher compiles filters as routes and gives the place of the first that matches, -1 for none.
func Matcher(filters ...string) (func(topic []byte) int, error) {
	var table []route[int]
	for i, f := range filters {
		table = append(table, route[int]{f, i})
	}
	r, err := newRoutes(table, -1)
	if err != nil {
		return nil, err
	}
	return r.match, nil
}

// Clock is a clock whose sources a test holds.
func Clock(now func() time.Time, synced func() bool) func() (ms int64, unsynced bool) {
	return (&clock{now: now, synced: synced}).read
}

// SystemClock is the clock as a gateway has it.
func SystemClock() func() (ms int64, unsynced bool) { return newClock().read }
