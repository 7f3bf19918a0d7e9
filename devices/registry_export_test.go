package devices

// SetMaxDevices lowers how many devices may be registered.
func SetMaxDevices(r *Registry, n int) { r.maxDevices = n }

// Recount returns the counts as they are stored and as the rows are.
func Recount(r *Registry) (stored, counted Tally, err error) {
	row, found, err := r.store.Get(countsKey)
	var c counts
	if err == nil && found {
		c, err = decodeCounts(row)
	}
	if err != nil {
		return stored, counted, err
	}
	stored = Tally(c)
	c = counts{}
	err = r.scan("", func(d *device) bool {
		c = c.plus(1, tally(d))
		return true
	})
	return stored, Tally(c), err
}

// Tally is the counts of devices.
type Tally counts
